"""Grams of outer products: every route, shared sides, one position, several parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops import gram as op
from mtu_fast._ops._blocks import working_dtype
from tests.helpers.truth import relative_error
from tests.ops.gram.blocks import (
    DTYPES,
    OUTER,
    Blocks,
    check,
    draw,
    outer_blocks,
    outer_plain,
    outer_truth,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OUTER)
@pytest.mark.parametrize("route", ["ghost", "direct"])
@pytest.mark.parametrize("small_tiles", [False, True])
def test_outer_gram(
    dtype: torch.dtype, kind: str, route: str, small_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "outer_route", lambda left, right, into, precision: route)
    if small_tiles:
        monkeypatch.setattr(_tiles, "TILE", 50)
        monkeypatch.setattr(_tiles, "BUFFER", 50)
    left, right = outer_blocks(kind, dtype)
    found = op.outer_gram(left, right)
    check(
        f"outer {route}, {kind}, {dtype}", found, outer_truth(left, right), outer_plain(left, right)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_gram_of_one_position(dtype: torch.dtype) -> None:
    left = [draw(r, 1, 5, dtype=dtype, seed=r) for r in (3, 2)]
    right = [draw(r, 1, 7, dtype=dtype, seed=r) for r in (3, 2)]
    assert op.outer_route(left, right) == "rank one"
    check(
        "rank one", op.outer_gram(left, right), outer_truth(left, right), outer_plain(left, right)
    )


RANK_ONE: dict[str, Callable[[torch.dtype], tuple[list[Blocks], list[Blocks]]]] = {
    "several parameters": lambda dtype: (
        [[draw(r, a, dtype=dtype, seed=a) for r in (3, 2)] for a in (5, 1, 130)],
        [[draw(r, b, dtype=dtype, seed=b) for r in (3, 2)] for b in (7, 4, 1)],
    ),
    "no rows in one block": lambda dtype: (
        ([[draw(0, 5, dtype=dtype), draw(2, 5, dtype=dtype)]],) * 2
    ),
}


def shared_sides(dtype: torch.dtype) -> tuple[list[Blocks], list[Blocks]]:
    """Two tasks on one activation; a third parameter whose rows are a side of the first, times one."""
    x, y = draw(4, 6, dtype=dtype, seed=1), draw(4, 9, dtype=dtype, seed=2)
    b = [draw(4, 9, dtype=dtype, seed=s) for s in (3, 4)]
    ones = x.new_ones(()).expand(4, 1)
    return [b, [y, y], b], [[x, x], [x, x], [ones, ones]]


def interleaved(dtype: torch.dtype) -> tuple[list[Blocks], list[Blocks]]:
    """A tensor on both sides of another with other rows, by columns, in unequal precision; a side used once more."""
    x, y = draw(3, 6, dtype=dtype, seed=1), draw(6, 2, dtype=dtype, seed=2).T
    b = [draw(r, 5, dtype=torch.float32, seed=s) for s, r in enumerate((3, 2, 3))]
    c = [draw(r, 4, dtype=dtype, seed=s) for s, r in enumerate((3, 2, 3))]
    return [b, c, b], [[x, y, x], b, c]


@pytest.mark.parametrize(
    "run", [op.rank_one_gram, op.rank_one_gram.reference], ids=["dispatched", "reference"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [*RANK_ONE.values(), shared_sides, interleaved])
def test_rank_one_gram(
    make: Callable[..., Any], dtype: torch.dtype, run: Callable[..., Tensor]
) -> None:
    left, right = make(dtype)
    found = run([t for side in left for t in side], [t for side in right for t in side], len(left))
    sides = list(zip(left, right, strict=True))
    rows = [
        torch.cat(
            [torch.einsum("ra,rb->rab", a[i].double(), b[i].double()).flatten(1) for a, b in sides],
            1,
        )
        for i in range(len(left[0]))
    ]
    check("rank one", found, rows, [t.to(working_dtype(left[0][0])) for t in rows])


@pytest.mark.parametrize(
    "run", [op.rank_one_gram, op.rank_one_gram.reference], ids=["dispatched", "reference"]
)
@pytest.mark.parametrize("make", [*RANK_ONE.values(), shared_sides, interleaved])
def test_rank_one_gram_leaves_out_what_is_known(
    make: Callable[..., Any], run: Callable[..., Tensor]
) -> None:
    """Zeros in their place, also where a block is known in part or shared with rows that are not."""
    left, right = make(torch.float64)
    sides = [[t for side in each for t in side] for each in (left, right)]
    whole = run(*sides, len(left))
    for known in range(len(whole) + 1):
        expected = whole.clone()
        fresh = len(whole) - known
        expected[fresh:, fresh:] = 0.0
        found = run(*sides, len(left), known)
        assert relative_error(found, expected) <= 1e-14 or torch.equal(found, expected)
    for wrong in (-1, len(whole) + 1):
        with pytest.raises(ValueError, match=f"known: found {wrong}, expected a number of rows"):
            op.rank_one_gram(sides[0], sides[1], len(left), wrong)


@pytest.mark.parametrize(
    ("left", "right", "parameters", "message"),
    [
        ([], [], 1, "found 0 and 0 blocks"),
        ([draw(2, 3)], [draw(2, 3)] * 2, 1, "found 1 and 2 blocks"),
        ([draw(2, 3)] * 3, [draw(2, 3)] * 3, 2, "for each of the 2 parameters"),
        ([draw(2, 3)], [draw(2, 3)], 0, "for each of the 0 parameters"),
        (
            [draw(2, 3), draw(3, 3)],
            [draw(2, 3), draw(3, 3)],
            2,
            r"block 1 .*expected \(2, 3\) and \(2, 3\)",
        ),
        ([draw(2, 3)], [draw(2, 1, 3)], 1, "the sides of block 0"),
        ([torch.zeros(())], [draw(2, 3)], 1, "the sides of block 0"),
        (
            [draw(2, 3), draw(1, 3)],
            [draw(2, 3), draw(1, 4)],
            1,
            r"block 1 .*expected \(1, 3\) and \(1, 3\)",
        ),
    ],
)
def test_rank_one_gram_refuses(left: Blocks, right: Blocks, parameters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.rank_one_gram(left, right, parameters)


def test_outer_route_prefers_what_is_cheaper() -> None:
    wide = [draw(4, 2, 256)], [draw(4, 2, 256)]
    long = [draw(4, 300, 4)], [draw(4, 300, 4)]
    assert op.outer_route(*wide) == "ghost" and op.outer_route(*long) == "direct"
