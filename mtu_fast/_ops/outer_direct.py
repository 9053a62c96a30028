"""The Gram of sums of outer products, by rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops._arguments import check_sides
from mtu_fast._ops._blocks import WIDE, square
from mtu_fast._ops._library import define
from mtu_fast._ops._pooling import Into, check_into, rows_of_gram, summed_rows
from mtu_fast._ops.row_gram import row_gram
from mtu_fast._ops.unordered_rows import unordered_rows


def _check_direct(
    left: Sequence[Tensor], right: Sequence[Tensor], precision: str, into: Into = ()
) -> None:
    check_sides(left, right, precision)
    check_into(into, sum(t.shape[0] for t in left))


@define(
    "outer_direct(Tensor[] left, Tensor[] right, str precision, int[] into=[]) -> Tensor",
    check=_check_direct,
)
def outer_direct(
    left: Sequence[Tensor], right: Sequence[Tensor], precision: str, into: Into = ()
) -> Tensor:
    """`outer_gram` by rows, a tile of them at a time; rows with one number in `into` are summed (`_pooling`)."""
    r, a, b = sum(t.shape[0] for t in left), left[0].shape[2], right[0].shape[2]
    met = rows_of_gram(into, r)
    gram = left[0].new_zeros(met, met, dtype=WIDE)
    outputs = [t.mT[:, None] for t in right]
    step = max(1, _tiles.buffer(left[0].device) // max(r * b, 1))
    # columns of the left side are parts of a row side by side: Gram matrices of parts add up
    for start in range(0, a, step):
        # features as channels, positions as pixels along one axis: a convolution of one tap
        tile = [t[:, :, start : start + step].mT[:, None] for t in left]
        rows = unordered_rows(tile, outputs, [1], [1], [0], [1], precision)
        gram += row_gram(summed_rows(rows, into))
    return gram


@outer_direct.fake
def _(left: Sequence[Tensor], right: Sequence[Tensor], precision: str, into: Into = ()) -> Tensor:
    return square(left, into)
