"""The Gram of explicit rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops import gram as op
from tests.ops.gram.blocks import (
    DTYPES,
    check,
    draw,
)

# ---- explicit rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[1], [5], [3, 1, 4], [0, 3], [2, 0]])
@pytest.mark.parametrize("width", [1, 7, 130])
def test_row_gram(
    dtype: torch.dtype, counts: list[int], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tiles, "TILE", 100)  # several tiles
    rows = [draw(r, width, dtype=dtype, seed=i) for i, r in enumerate(counts)]
    check("row_gram", op.row_gram(rows), rows, rows)


def test_row_gram_sums_in_float64() -> None:
    """Rows that differ in the seventh digit: a float32 product would call them equal."""
    base = draw(1, 100_000, dtype=torch.float32)
    rows = torch.cat([base, base + 1e-3 * draw(1, 100_000, dtype=torch.float32, seed=1)])
    G, truth = op.row_gram([rows]), (rows[0].double() - rows[1].double()).square().sum()

    def distance(M: Tensor) -> Tensor:
        return M[0, 0] + M[1, 1] - 2 * M[0, 1]

    assert float((distance(G) - truth).abs() / truth) <= 1e-6
    plain = (rows @ rows.T).double()
    assert float((distance(plain) - truth).abs() / truth) > 1e-2


def test_row_gram_of_duplicates_and_zeros() -> None:
    row = draw(1, 33)
    G = op.row_gram([torch.cat([row, row, 0 * row]), row])
    assert torch.allclose(
        G,
        float(row.square().sum())
        * torch.tensor([1.0, 1, 0, 1]).outer(torch.tensor([1.0, 1, 0, 1])).double(),
    )


def test_row_gram_of_views() -> None:
    rows = [draw(9, 5).T, draw(2, 18)[:, ::2], draw(9)[None].expand(3, 9)]
    check("views", op.row_gram(rows), rows, rows)
