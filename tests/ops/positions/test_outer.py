"""Grams of outer products by both routes, as dispatched (the kernel, where it is built) and as references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops.gram import outer_direct, outer_ghost
from tests.helpers.tolerance import assert_as_accurate
from tests.ops.positions.exact import (
    DTYPES,
    built,
    integers,
    named,
    outer_exact,
)


@pytest.fixture(params=named([outer_ghost, outer_direct]))
def outer(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = request.param
    return found


@pytest.mark.parametrize("sizes", [
    [(1, 1)], [(1, 7)], [(1, 8)], [(3, 8)], [(1, 95)], [(1, 96)], [(1, 97)], [(97, 1)],
    [(7, 23), (5, 11), (0, 4), (2, 0)],
    [(2, 193)], [(10, 20), (3, 65), (1, 1), (40, 2)], [(0, 3)], [(3, 0)],
])  # fmt: skip
@pytest.mark.parametrize(("a", "b"), [(1, 1), (5, 3), (257, 16), (0, 4), (520, 255)])
def test_every_number_of_positions(
    outer: Callable[..., Tensor],
    sizes: list[tuple[int, int]],
    a: int,
    b: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_tiles, "TILE", 1 << 12)
    left = [integers(r, s, a) for r, s in sizes]
    right = [integers(r, s, b) for r, s in sizes]
    found = outer(left, right, "highest")
    assert found.dtype == torch.float64
    assert torch.equal(found, outer_exact(left, right))


@built
@pytest.mark.parametrize("rows", [2_100, 9])
def test_many_positions(rows: int) -> None:
    left, right = integers(rows, 2_100 // rows + 1, 3), integers(rows, 2_100 // rows + 1, 2)
    other = integers(rows, 2_100 // rows + 1, 2)
    for outer in (outer_ghost, outer_direct):
        assert torch.equal(outer([left], [right], "highest"), outer_exact([left], [right]))
        assert torch.equal(
            outer([left] * 2, [right, other], "highest"), outer_exact([left] * 2, [right, other])
        )


@built
@pytest.mark.parametrize("rows", [1, 40, 300])
@pytest.mark.parametrize(("a", "b"), [(24, 64), (64, 25), (13, 200), (200, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_of_rows(rows: int, a: int, b: int, dtype: torch.dtype) -> None:
    """Whole panels and broken ones, either side the wider; rows that fill the cache by themselves, or leave room."""
    left, right = integers(rows, 3, a, dtype=dtype), integers(rows, 3, b, dtype=dtype)
    assert torch.equal(outer_direct([left], [right], "highest"), outer_exact([left], [right]))


def test_blocks_of_different_dtypes(outer: Callable[..., Tensor]) -> None:
    left = [integers(3, 5, 33, dtype=dtype) for dtype in DTYPES]
    right = [integers(3, 5, 9, dtype=dtype) for dtype in reversed(DTYPES)]
    assert torch.equal(outer(left, right, "highest"), outer_exact(left, right))


def test_views(outer: Callable[..., Tensor]) -> None:
    every_other = integers(4, 8, 12)[::2, 1:, ::2]
    left = [
        integers(6, 20, 9).permute(1, 2, 0),
        integers(9, 6)[:, None].expand(9, 30, 6),
        every_other,
    ]
    swapped = integers(7, 2, 7).transpose(0, 1)
    right = [integers(20, 9, 1).expand(20, 9, 7), integers(1, 30, 7).expand(9, 30, 7), swapped]
    assert torch.equal(outer(left, right, "highest"), outer_exact(left, right))


def test_both_sides_shared(outer: Callable[..., Tensor]) -> None:
    a, b, c = integers(5, 30, 6), integers(5, 30, 4), integers(5, 30, 4)
    left, right = [a, a, a], [b, c, b]
    assert torch.equal(outer(left, right, "highest"), outer_exact(left, right))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 4, 12])
def test_what_is_not_finite_stays_in_its_row(
    outer: Callable[..., Tensor], value: float, place: int
) -> None:
    left, right = integers(6, 13, 5) + 0.5, integers(6, 13, 4) + 0.25
    left[4, place, 4] = value
    found = outer([left], [right], "highest")
    others = torch.tensor([0, 1, 2, 3, 5])
    assert not found[4].isfinite().any() and not found[:, 4].isfinite().any()
    assert torch.equal(found[others][:, others], outer_exact([left[others]], [right[others]]))


@built
def test_rows_of_very_many_positions_are_as_accurate_as_the_vendor_s() -> None:
    left, right = torch.rand(3, 100_000, 13), torch.rand(3, 100_000, 9)
    rows = torch.bmm(left.mT, right).flatten(1).double()
    truth = outer_exact([left], [right])
    assert_as_accurate(
        "many positions", outer_direct([left], [right], "highest"), rows @ rows.T, truth
    )
