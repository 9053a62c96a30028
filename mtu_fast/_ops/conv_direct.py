"""The Gram of convolution weight gradients, by rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops._arguments import check_images
from mtu_fast._ops._blocks import WIDE, square
from mtu_fast._ops._convolution import Geometry
from mtu_fast._ops._library import define
from mtu_fast._ops._pixels import WALK
from mtu_fast._ops._pooling import Into, check_into, rows_of_gram, summed_rows
from mtu_fast._ops.row_gram import row_gram
from mtu_fast._ops.unordered_rows import unordered_rows

# rows of blocks x and b
Form = Callable[[Sequence[Tensor], Sequence[Tensor], Geometry], Sequence[Tensor]]


def gram_by_rows(
    x: Sequence[Tensor],
    b: Sequence[Tensor],
    geometry: Geometry,
    form: Form,
    into: Into = (),
) -> Tensor:
    """`conv_gram` of rows `[R_i, columns]` by `form`, a tile of output channels at a time where they come first."""
    r = sum(t.shape[0] for t in x)
    met = rows_of_gram(into, r)
    gram = x[0].new_zeros(met, met, dtype=WIDE)
    channels = b[0].shape[2]
    step = (
        max(1, _tiles.buffer(x[0].device) // max(r * prod(geometry.weight[1:]), 1))
        if geometry.plain
        else channels
    )
    # output channels are parts of a row side by side: Gram matrices of parts add up
    for start in range(0, channels, step):
        stop = min(start + step, channels)
        part = (
            replace(geometry, weight=(stop - start, *geometry.weight[1:]))
            if geometry.plain
            else geometry
        )
        tiles = form(x, [b_i[:, :, start:stop] for b_i in b], part)
        gram += row_gram(summed_rows(tiles, into))
    return gram


def _check_direct(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str, into: Into = (),
) -> None:  # fmt: skip
    check_images(x, b, kernel, stride, padding, dilation, precision)
    check_into(into, sum(t.shape[0] for t in x))


@define(
    f"conv_direct(Tensor[] x, Tensor[] b, {WALK}, str precision, int[] into=[]) -> Tensor",
    check=_check_direct,
)
def conv_direct(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str, into: Into = (),
) -> Tensor:  # fmt: skip
    """`conv_gram` of one group, forward, by rows, a tile of them at a time; `into` as in `outer_direct`."""
    weight = (b[0].shape[2], x[0].shape[2], *kernel)
    geometry = Geometry(
        weight, tuple(stride), tuple(padding), tuple(dilation), False, (0,) * len(kernel), 1
    )

    def form(x: Sequence[Tensor], b: Sequence[Tensor], _: Geometry) -> Sequence[Tensor]:
        return unordered_rows(x, b, kernel, stride, padding, dilation, precision)

    return gram_by_rows(x, b, geometry, form, into)


@conv_direct.fake
def _(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str, into: Into = (),
) -> Tensor:  # fmt: skip
    return square(x, into)
