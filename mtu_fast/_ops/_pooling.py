"""Rows that enter a Gram as their sum: `into[r]` is the row of the Gram that row r is added to, -1 for none.

With S the `[V, R]` matrix of ones at `[into[r], r]`, the Gram is that of the rows S J, which is S G Sᵀ.
Nothing given means S = I.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

Into = Sequence[int]


def rows_of_gram(into: Into, rows: int) -> int:
    """V, the rows of the Gram, of so many rows given."""
    return max(into, default=-1) + 1 if into else rows


def check_into(into: Into, rows: int) -> None:
    """A row of the Gram for each row given, or nothing.

    Raises:
        ValueError: as many as rows are not given, or the rows of the Gram are not 0, 1, … without a gap.
    """
    if not into:
        return
    if len(into) != rows:
        raise ValueError(f"into: found {len(into)} numbers, expected {rows}, one per row, or none.")
    named = set(into) - {-1}
    if named != set(range(len(named))):
        raise ValueError(
            f"into: found rows of the Gram {sorted(named)[:8]}, expected 0, 1, … without a gap, or -1 for none."
        )


def summed_rows(blocks: Sequence[Tensor], into: Into) -> list[Tensor]:
    """The rows S J, where some are to be summed: blocks `[R_i, P]` -> one block `[V, P]`."""
    if not into:
        return list(blocks)
    # kept rows may be in a lower precision than a step's own
    dtype = reduce(torch.promote_types, [block.dtype for block in blocks])
    found = blocks[0].new_zeros(rows_of_gram(into, len(into)), blocks[0].shape[1], dtype=dtype)
    start = 0
    for block in blocks:
        _add(found, block.to(dtype), into[start : start + len(block)])
        start += len(block)
    return [found]


def summed_gram(gram: Tensor, into: Into) -> Tensor:
    """S G Sᵀ, float64 `[V, V]`, from G `[R, R]`."""
    if not into:
        return gram
    rows = gram.new_zeros(rows_of_gram(into, len(into)), len(gram))
    _add(rows, gram, into)
    found = gram.new_zeros(len(rows), len(rows))
    _add(found, rows.T, into)
    return found


def _add(found: Tensor, rows: Tensor, into: Into) -> None:
    kept = [r for r, row in enumerate(into) if row >= 0]
    chosen = rows if len(kept) == len(rows) else rows[kept]
    at = torch.tensor([into[r] for r in kept], dtype=torch.int64, device=found.device)
    found.index_add_(0, at, chosen)
