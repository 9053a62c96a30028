"""The Gram of sums of outer products, by products of positions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

from torch import Tensor

from mtu_fast._ops._arguments import check_sides
from mtu_fast._ops._blocks import (
    WIDE,
    distinct,
    families,
    offsets,
    pairs,
    place,
    square,
    summed_products,
)
from mtu_fast._ops._library import define
from mtu_fast._ops._tiles import strips


@define("outer_ghost(Tensor[] left, Tensor[] right, str precision) -> Tensor", check=check_sides)
def outer_ghost(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    """`outer_gram` by products of positions, `Σ_{s,u} (left_rs · left_qu) (right_rs · right_qu)`."""
    # the side that is shared more widely is multiplied once a family
    if len(distinct(right)) < len(distinct(left)):
        left, right = right, left
    starts = offsets(left)
    gram = left[0].new_zeros(starts[-1], starts[-1], dtype=WIDE)
    wide = {i: t.to(WIDE) for i, t in enumerate(right)}
    for family, other in combinations_with_replacement(families(left), 2):
        a = left[family[0]].to(WIDE)
        c = a if family is other else left[other[0]].to(WIDE)
        for lo, hi in strips(a.shape[0], a.shape[1] * c.shape[0] * c.shape[1]):
            # the upper triangle is enough
            cut = lo if family is other and len(family) == 1 else 0
            shared = a[lo:hi].flatten(0, 1) @ c[cut:].flatten(0, 1).T  # [strip·S, Q·U]
            for i, j in pairs(family, other):
                # ⟨a ⊗ b, c ⊗ d⟩ = ⟨a, c⟩ ⟨b, d⟩, summed over both positions
                tile = summed_products(wide[i][lo:hi], wide[j][cut:], shared)
                place(gram, tile, starts[i] + lo, starts[j] + cut)
    return gram


@outer_ghost.fake
def _(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    return square(left)


outer_ghost.triton("gram")
