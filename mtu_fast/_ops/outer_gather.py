"""Outer products met with look-ups in the same table."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops._arguments import check_devices, check_lookups, check_sides
from mtu_fast._ops._blocks import WIDE, families, offsets
from mtu_fast._ops._library import define
from mtu_fast._ops._tiles import strips


def _check_met(
    left: Sequence[Tensor], right: Sequence[Tensor], index: Sequence[Tensor], values: Sequence[Tensor],
    precision: str = "highest",
) -> None:  # fmt: skip
    check_sides(left, right, precision)
    check_lookups(index, values, precision)
    check_devices(left=left, values=values)
    if right[0].shape[2] != values[0].shape[2]:
        raise ValueError(
            f"the right sides have shape {tuple(right[0].shape)} and the values {tuple(values[0].shape)}, expected one "
            "width, that of the table."
        )


@define(
    'outer_gather(Tensor[] left, Tensor[] right, Tensor[] index, Tensor[] values, str precision="highest") -> Tensor',
    check=_check_met,
)
def outer_gather(
    left: Sequence[Tensor], right: Sequence[Tensor], index: Sequence[Tensor], values: Sequence[Tensor],
    precision: str = "highest",
) -> Tensor:  # fmt: skip
    """`C[r, q] = Σ_{s,t} left_rs[index_qt] (right_rs · values_qt)`: outer products met with scattered rows of a table.

    Blocks left `[R_i, S_i, A]`, right `[R_i, S_i, B]`, and index `[Q_j, T_j]` into A, values `[Q_j,
    T_j, B]` -> float64 `[R, Q]`. No row of the table's size is formed: a strip of products of
    positions, and the entries of `left` that they go with. Products with a right side that blocks
    share (the activations under several tasks) are made once.
    """
    starts, ends = offsets(left), offsets(index)
    found = left[0].new_zeros(starts[-1], ends[-1], dtype=WIDE)
    for j, (where, value) in enumerate(zip(index, values, strict=True)):
        (q, t), at = where.shape, where.flatten()
        theirs = value.to(WIDE).flatten(0, 1).T  # [B, Q·T]
        for family in families(right):
            mine = right[family[0]]
            step = max(
                1, _tiles.TILE // max(q * t, 1)
            )  # positions; of several rows where one has fewer
            for lo, hi in strips(mine.shape[0], mine.shape[1] * q * t):
                for start in range(0, mine.shape[1], step):
                    part = mine[lo:hi, start : start + step].to(WIDE)
                    # [rows · positions, Q · T]: the products of right sides with values
                    shared = part.flatten(0, 1) @ theirs
                    for i in family:
                        entries = left[i][lo:hi, start : start + step].index_select(2, at)
                        tile = shared * entries.flatten(0, 1)
                        # summed over T, then over positions
                        met = tile.view(len(shared), q, t).sum(2).view(*part.shape[:2], q).sum(1)
                        found[starts[i] + lo : starts[i] + hi, ends[j] : ends[j + 1]] += met
    return found


@outer_gather.fake
def _(
    left: Sequence[Tensor], right: Sequence[Tensor], index: Sequence[Tensor], *_: object
) -> Tensor:
    return left[0].new_empty(
        sum(t.shape[0] for t in left), sum(t.shape[0] for t in index), dtype=WIDE
    )
