"""`G = J Jᵀ` from what is known of the rows: explicit rows, outer products, convolutions, table look-ups.

One function per kind of use. Each takes the blocks of one parameter (one block per task and
forward), returns the float64 Gram of all their rows, and picks the cheaper of two routes:

* *direct*: the rows themselves, a tile of the parameter at a time, `Σ_tiles X Xᵀ` (the ops
  `outer_direct` and `conv_direct`; `row_gram` of rows that are there);
* *ghost*: positions instead of parameters, `G[r, q] = Σ_{s,u} (left_rs · left_qu) (right_rs ·
  right_qu)`, products of a side that blocks share (the activations under several tasks) made once
  (the ops `outer_ghost` and `conv_ghost`).

Where every row is one outer product, one position, there is no choice: `rank_one_gram`, for many
parameters at a time. A table that is looked up and multiplied with, as an embedding that is the
head too, has rows of both kinds, which meet in `outer_gather`.

Products of rows are summed in float64 everywhere: a float32 Gram loses half of the digits that a
solve needs (see CONTRIBUTING.md). A row itself is rounded as any gradient of its dtype.

`precision` says how exact the products under these sums must be, in torch's words: "highest",
"high" (float32 products may be TF32×3) or "medium" (TF32, or bfloat16 where the input is). It is a
permission: a kernel may be more exact, and plain torch is always at its highest.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtu_fast._ops._arguments import check_sides
from mtu_fast._ops._convolution import Geometry
from mtu_fast._ops._pooling import Into, summed_gram
from mtu_fast._ops.conv_direct import conv_direct, gram_by_rows
from mtu_fast._ops.conv_ghost import conv_ghost
from mtu_fast._ops.explicit import conv_rows
from mtu_fast._ops.gather_gram import gather_gram
from mtu_fast._ops.outer_direct import outer_direct
from mtu_fast._ops.outer_gather import outer_gather
from mtu_fast._ops.outer_ghost import outer_ghost
from mtu_fast._ops.rank_one_gram import rank_one_gram
from mtu_fast._ops.routes import (
    conv_cost,
    conv_route,
    inexact,
    meet_together,
    outer_cost,
    outer_route,
    prices,
    rows_pay_for_table,
)
from mtu_fast._ops.row_gram import row_gram

__all__ = [
    "conv_cost",
    "conv_direct",
    "conv_ghost",
    "conv_gram",
    "conv_route",
    "gather_gram",
    "inexact",
    "meet_together",
    "outer_cost",
    "outer_direct",
    "outer_gather",
    "outer_ghost",
    "outer_gram",
    "outer_route",
    "prices",
    "rank_one_gram",
    "row_gram",
    "rows_pay_for_table",
]


def outer_gram(
    left: Sequence[Tensor], right: Sequence[Tensor], precision: str = "highest", into: Into = ()
) -> Tensor:
    """`G = J Jᵀ` of rows `Σ_s left ⊗ right`: blocks left `[R_i, S_i, A]`, right `[R_i, S_i, B]` -> float64 `[R, R]`.

    Rows with one number in `into` are summed, see `_pooling`.
    """
    check_sides(left, right, precision)
    route = outer_route(left, right, into, precision)
    if route == "direct":
        return outer_direct.unchecked(left, right, precision, into)
    if route == "ghost":
        return summed_gram(outer_ghost.unchecked(left, right, precision), into)
    of_left, of_right = [t[:, 0] for t in left], [t[:, 0] for t in right]
    return summed_gram(rank_one_gram.unchecked(of_left, of_right, 1), into)


def conv_gram(
    x: Sequence[Tensor],
    b: Sequence[Tensor],
    geometry: Geometry,
    precision: str = "highest",
    into: Into = (),
) -> Tensor:
    """`G = J Jᵀ` of convolution weight gradients: blocks x `[R_i, F, C, *]`, b `[R_i, F, O, *]` -> float64 `[R, R]`.

    Rows with one number in `into` are summed, see `_pooling`.
    """
    check_sides(x, b, precision, axes=len(geometry.kernel))
    walk = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    if not geometry.plain:
        return gram_by_rows(x, b, geometry, _conv_rows, into)
    if conv_route(x, b, geometry, into, precision) == "ghost":
        return summed_gram(conv_ghost(x, b, *walk, precision), into)
    return conv_direct(x, b, *walk, precision, into)


def _conv_rows(x: Sequence[Tensor], b: Sequence[Tensor], geometry: Geometry) -> list[Tensor]:
    return [conv_rows(x_i, b_i, geometry).flatten(1) for x_i, b_i in zip(x, b, strict=True)]
