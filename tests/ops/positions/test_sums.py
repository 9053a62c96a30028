"""Rows that are summed: in parts, by lane, and into rows of the Gram."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast._ops.gram import conv_direct, outer_direct, row_gram
from tests.ops.positions.exact import (
    DTYPES,
    built,
    conv_exact,
    images,
    integers,
    named,
    outer_exact,
    walk,
)


@built
@pytest.mark.parametrize("positions", [191, 192, 193, 500])
def test_rows_that_are_summed_in_parts(positions: int) -> None:
    left, right = integers(3, positions, 20), integers(3, positions, 40)
    assert torch.equal(outer_direct([left], [right], "highest"), outer_exact([left], [right]))
    x, b = images(3, 2, 5, (21, 19), 7, walk())
    assert torch.equal(conv_direct([x], [b], *walk()), conv_exact([x], [b], walk()))


@built
@pytest.mark.parametrize("rows", [88, 92, 300])
def test_sums_by_lane_are_kept_or_folded(rows: int) -> None:
    J = integers(rows, 700)
    assert torch.equal(row_gram([J]), J.double() @ J.double().T)


INTO = [[0, 1, 2, 3, 4], [0, 0, 1, 1, 0], [-1, 0, -1, 1, 1], [1, 0, 1, 0, 1], [-1] * 5, [0] * 5]


def summing(into: list[int]) -> Tensor:
    """S `[V, R]`, ones where a row goes."""
    S = torch.zeros(max(into) + 1, len(into), dtype=torch.float64)
    for r, row in enumerate(into):
        if row >= 0:
            S[row, r] = 1.0
    return S


@pytest.mark.parametrize("into", INTO, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 3), (4, 130, 7), (200, 3, 40), (0, 4, 4)], ids=str)
@pytest.mark.parametrize("function", named([outer_direct]))
def test_summed_rows_of_outer_products(
    function: Callable[..., Tensor],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    into: list[int],
) -> None:
    """S G Sᵀ, also where tasks share an activation and a row's positions are summed in several turns."""
    s, a, b = shape
    shared = integers(2, s, a, dtype=dtype)
    left = [shared, integers(1, s, a, dtype=dtype), shared]
    right = [integers(t.shape[0], s, b, dtype=dtype) for t in left]
    S = summing(into)
    assert torch.equal(function(left, right, "highest", into), S @ outer_exact(left, right) @ S.T)


@pytest.mark.parametrize("into", INTO, ids=str)
@pytest.mark.parametrize("function", named([conv_direct]))
def test_summed_rows_of_convolutions(function: Callable[..., Tensor], into: list[int]) -> None:
    x = [integers(2, 1, 3, 6, 6), integers(3, 1, 3, 6, 6)]
    b = [integers(t.shape[0], 1, 4, 6, 6) for t in x]
    S = summing(into)
    assert torch.equal(function(x, b, *walk(), into), S @ conv_exact(x, b, walk()) @ S.T)


@pytest.mark.parametrize(
    "into", [[0, 1], [0, 0, 0, 0, 5], [0, 0, 2, 2, 2], [-2, 0, 0, 0, 0], [0] * 6], ids=str
)
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "the kernel alone"])
def test_rows_of_the_gram_without_a_row(into: list[int], checked: bool) -> None:
    left, right = [integers(5, 2, 3)], [integers(5, 2, 4)]
    outer: Any = outer_direct if checked else outer_direct.overload
    with pytest.raises((ValueError, RuntimeError), match="into: "):
        outer(left, right, "highest", into)
    x, b = [integers(5, 1, 2, 4, 4)], [integers(5, 1, 2, 4, 4)]
    conv: Any = conv_direct if checked else conv_direct.overload
    with pytest.raises((ValueError, RuntimeError), match="into: "):
        conv(x, b, *walk(), into)
