"""Directions in the dtypes of their parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast._rows import narrowing
from mtu_fast._rows.narrowing import narrowed

KINDS = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.bfloat16]


def parts(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """A parameter of each kind, and its part of a direction."""
    found = []
    for kind in KINDS:
        part = torch.randn(3, 4, dtype=torch.float64).to(dtype)
        found.append((torch.zeros(4, 3, dtype=kind), part.T))
    return found


@pytest.mark.parametrize("waiting", [0, 1 << 26])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_are_rounded_and_one_call_has_one_dtype(
    dtype: torch.dtype, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU takes many tensors in one launch by the dtype of the first."""
    copy, calls = torch._foreach_copy_, list[int]()

    def counted(to: list[Tensor], of: list[Tensor]) -> None:
        assert len({t.dtype for t in to}) == len({t.dtype for t in of}) == 1
        calls.append(len(to))
        copy(to, of)

    monkeypatch.setattr(narrowing, "WAITING", waiting)
    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    found = parts(dtype)
    rounded = narrowed(iter(found))
    assert list(rounded) == [parameter for parameter, _ in found]
    for parameter, part in found:
        assert torch.equal(rounded[parameter], part.to(parameter.dtype))
        assert rounded[parameter].dtype == parameter.dtype
    of_each = [
        sum(kind == each for each in KINDS) for kind in dict.fromkeys(KINDS) if kind != dtype
    ]
    assert calls == (of_each if waiting else [1] * sum(of_each))
