"""The Gram of convolution weight gradients, by products of positions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

from torch import Tensor

from mtu_fast._ops._arguments import check_images
from mtu_fast._ops._blocks import WIDE, families, offsets, pairs, place, square, summed_products
from mtu_fast._ops._library import define
from mtu_fast._ops._pixels import WALK, Walk, by_pixel, patch_gram
from mtu_fast._ops._tiles import strips


@define(f"conv_ghost(Tensor[] x, Tensor[] b, {WALK}, str precision) -> Tensor", check=check_images)
def conv_ghost(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str,
) -> Tensor:  # fmt: skip
    """`conv_gram` of one group, forward, by products of positions: the patch Gram is made of shifted pixel Grams.

    `G[r, q] = Σ_{p,s} (Σ_δ x_r(p+δ)·x_q(s+δ)) (b_r(p)·b_q(s))`.
    """
    walk = Walk(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    starts = offsets(x)
    gram = x[0].new_zeros(starts[-1], starts[-1], dtype=WIDE)
    # widened once, since each meets every other
    gradients = {i: by_pixel(t) for i, t in enumerate(b)}
    # several tasks on one input share its patch Gram
    for family, other in combinations_with_replacement(families(x), 2):
        rows, columns = x[family[0]], x[other[0]]
        grid, far_grid = b[family[0]].shape[3:], b[other[0]].shape[3:]
        near, far = gradients[family[0]], gradients[other[0]]
        for lo, hi in strips(len(rows), near.shape[1] * far.shape[0] * far.shape[1]):
            # the upper triangle is enough
            cut = lo if family is other and len(family) == 1 else 0
            patches = patch_gram(rows[lo:hi], columns[cut:], grid, far_grid, walk)
            for i, j in pairs(family, other):
                tile = summed_products(gradients[i][lo:hi], gradients[j][cut:], patches)
                place(gram, tile, starts[i] + lo, starts[j] + cut)
    return gram


@conv_ghost.fake
def _(x: Sequence[Tensor], *_: object) -> Tensor:
    return square(x)


conv_ghost.triton("gram")
