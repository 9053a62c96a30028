"""The one tolerance rule: at most twice the error of plain torch in the same precision on the same input, plus eps."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.truth import relative_error

FEW = 8


def allowed_error(plain: Tensor, truth: Tensor) -> float:
    """2 · error(plain) + a few eps of the precision `plain` was computed in, relative to ‖truth‖."""
    return 2.0 * relative_error(plain, truth) + FEW * torch.finfo(plain.dtype).eps


def error_ratio(found: Tensor, plain: Tensor, truth: Tensor) -> float:
    """error(found) over what is allowed; at most 1 where `found` is as accurate as plain torch.

    Args:
        found: the result under test.
        plain: the same by plain torch operations, in the same precision on the same input.
        truth: the same in float64 on the same input.
    """
    if truth.dtype != torch.float64:
        raise TypeError(
            f"the truth is {truth.dtype}, expected float64 arithmetic on the same input"
        )
    return relative_error(found, truth) / allowed_error(plain, truth)


def assert_as_accurate(name: str, found: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Fail where `found` errs more than the rule allows; the ratio is printed either way."""
    ratio = error_ratio(found, plain, truth)
    print(f"{name}: error {relative_error(found, truth):.2e}, {ratio:.2f} of what is allowed")
    if not ratio <= 1.0:
        raise AssertionError(
            f"{name}: errs {ratio:.2f} times what is allowed (2 x plain torch's error + {FEW} eps)"
        )
