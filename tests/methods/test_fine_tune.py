"""Fine-tuning: weights by hand, against the reference, and what it is the same as."""

from __future__ import annotations

import torch

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, FineTune, GradDiff
from tests.helpers.matrices import conditioned, roles
from tests.helpers.truth import relative_error

R = roles([RETAIN, FORGET, RETAIN, FORGET, RETAIN], [0, 0, 1, 1, 1])


def test_weights() -> None:
    assert torch.equal(FineTune()(None, R), torch.tensor([1, 0, 0.5, 0, 0.5], dtype=torch.float64))
    assert torch.equal(FineTune().outside(R), FineTune()(None, R))


def test_is_the_reference() -> None:
    J = conditioned(5, 8, 10.0)
    truth = reference.fine_tune({"a": J[:1], "b": J[[2, 4]]})
    assert relative_error(J.t() @ FineTune()(None, R), truth) < 1e-14


def test_is_graddiff_without_forget() -> None:
    assert torch.equal(FineTune()(None, R), GradDiff(1.0)(None, R))


def test_without_retain_rows_nothing_happens() -> None:
    assert torch.equal(FineTune()(None, roles([FORGET] * 3)), torch.zeros(3, dtype=torch.float64))
