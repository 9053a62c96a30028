"""The Gram of sums of outer products, by rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops._arguments import check_sides
from mtu_fast._ops._blocks import WIDE, square
from mtu_fast._ops._library import define
from mtu_fast._ops.explicit import outer_rows
from mtu_fast._ops.row_gram import row_gram


@define("outer_direct(Tensor[] left, Tensor[] right, str precision) -> Tensor", check=check_sides)
def outer_direct(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    """`outer_gram` by rows, a tile of them at a time."""
    r, a, b = sum(t.shape[0] for t in left), left[0].shape[2], right[0].shape[2]
    gram = left[0].new_zeros(r, r, dtype=WIDE)
    step = max(1, _tiles.BUFFER // max(r * b, 1))
    for start in range(0, a, step):
        tiles = [
            outer_rows(p[:, :, start : start + step], q) for p, q in zip(left, right, strict=True)
        ]
        gram += row_gram([t.flatten(1) for t in tiles])
    return gram


@outer_direct.fake
def _(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    return square(left)
