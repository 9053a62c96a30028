"""Grams of table look-ups, by themselves and beside outer products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops import gram as op
from mtu_fast._ops._blocks import working_dtype
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.truth import relative_error
from tests.ops.gram.blocks import (
    DTYPES,
    check,
    draw,
    explicit,
    gather_truth,
    met_blocks,
    outer_plain,
    outer_truth,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[(3, 5)], [(1, 1)], [(3, 5), (2, 1), (4, 2)], [(2, 0), (3, 2)]])
@pytest.mark.parametrize("small_tiles", [False, True])
def test_gather_gram(
    dtype: torch.dtype,
    sizes: list[tuple[int, int]],
    small_tiles: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Indices repeat within a row and across rows and blocks."""
    if small_tiles:
        monkeypatch.setattr(_tiles, "BUFFER", 40)
    index = [torch.randint(0, 7, size) for size in sizes]
    values = [draw(*size, 4, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    truth = gather_truth(index, values, 7)
    plain = [t.to(working_dtype(values[0])) for t in truth]
    check(f"gather, {dtype}", op.gather_gram(index, values), truth, plain)


def test_gather_gram_of_a_large_table_reads_what_occurs() -> None:
    """Rows of a table of 10⁹ entries cannot be formed; the three that occur can."""
    index = torch.tensor([[5, 999_999_999], [7, 5]])
    values = draw(2, 2, 3)
    truth = gather_truth([torch.tensor([[0, 1], [2, 0]])], [values], 3)
    assert relative_error(op.gather_gram([index], [values]), explicit(truth)) <= 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["one block", "unequal", "left shared", "right shared", "views", "no position"]
)
@pytest.mark.parametrize("tile", [1, 10, 1 << 20])
def test_outer_gather(
    kind: str, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By position, by positions of a row, by rows."""
    monkeypatch.setattr(_tiles, "TILE", tile)
    blocks = met_blocks("left shared" if kind == "right shared" else kind, dtype)
    if kind == "right shared":
        blocks = ([draw(*t.shape[:2], 5, dtype=dtype, seed=i) for i, t in enumerate(blocks[0])],
                  [draw(*t.shape[:2], 7, dtype=dtype) for t in blocks[0]], *blocks[2:])  # fmt: skip
    left, right, index, values = blocks

    def rows(exact: bool) -> tuple[Tensor, Tensor]:
        outers = outer_truth(left, right) if exact else outer_plain(left, right)
        scattered = gather_truth(index, values, 5)
        return (torch.cat([t.flatten(1) for t in outers]),
                torch.cat([t.flatten(1) for t in scattered]).to(outers[0].dtype))  # fmt: skip

    found, (J, K), (J_plain, K_plain) = (
        op.outer_gather(left, right, index, values),
        rows(True),
        rows(False),
    )
    assert found.dtype == torch.float64
    assert_as_accurate(f"outer_gather, {dtype}", found, J_plain @ K_plain.T, J @ K.T)


def test_outer_gather_of_a_large_table_reads_what_occurs() -> None:
    """A table of 10⁶ entries of 10⁴ numbers, 80 GB a row: the left sides are 10⁶ numbers a position."""
    left, right = torch.randn(2, 1, 10**6), torch.randn(2, 1, 10**4)
    index, values = torch.tensor([[5, 999_999]]), torch.randn(1, 2, 10**4)
    truth = (left[:, 0, index[0]].double() * (right[:, 0].double() @ values[0].double().T)).sum(
        1, keepdim=True
    )
    assert relative_error(op.outer_gather([left], [right], [index], [values]), truth) <= 1e-14
