"""The Gram of rows of a table that is looked up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops._arguments import check_lookups
from mtu_fast._ops._blocks import WIDE, square
from mtu_fast._ops._library import define
from mtu_fast._ops.explicit import gather_rows
from mtu_fast._ops.row_gram import row_gram


@define(
    'gather_gram(Tensor[] index, Tensor[] values, str precision="highest") -> Tensor',
    check=check_lookups,
)
def gather_gram(
    index: Sequence[Tensor], values: Sequence[Tensor], precision: str = "highest"
) -> Tensor:
    """`G = J Jᵀ` of scattered rows: blocks index `[R_i, S_i]`, values `[R_i, S_i, D]` -> float64 `[R, R]`.

    Only table entries that occur are formed, a tile of them at a time.
    """
    r = sum(t.shape[0] for t in index)
    gram = values[0].new_zeros(r, r, dtype=WIDE)
    # entries that no row reads are zeros of every row
    used, flat = torch.unique(torch.cat([t.flatten() for t in index]), return_inverse=True)
    compact = [
        c.view_as(t) for c, t in zip(flat.split([t.numel() for t in index]), index, strict=True)
    ]
    step = max(1, _tiles.buffer(values[0].device) // max(r * values[0].shape[2], 1))
    for start in range(0, used.numel(), step):
        size = min(step, used.numel() - start)
        tiles = []
        for where, value in zip(compact, values, strict=True):
            # a look-up outside the tile is clamped into it, and its value is zero
            inside = (where >= start) & (where < start + size)
            tiles.append(
                gather_rows(
                    (where - start).clamp(0, size - 1), value * inside[..., None], size
                ).flatten(1)
            )
        gram += row_gram(tiles)
    return gram


@gather_gram.fake
def _(index: Sequence[Tensor], values: Sequence[Tensor], precision: str = "highest") -> Tensor:
    return square(values)


gather_gram.triton("gram")
