"""The Gram of explicit rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops._arguments import check_explicit, check_known
from mtu_fast._ops._blocks import WIDE, square
from mtu_fast._ops._library import define


def _check_rows(rows: Sequence[Tensor], known: int = 0) -> None:
    check_explicit(rows)
    check_known(known, sum(t.shape[0] for t in rows))


@define("row_gram(Tensor[] rows, int known=0) -> Tensor", check=_check_rows)
def row_gram(rows: Sequence[Tensor], known: int = 0) -> Tensor:
    """`G = J Jᵀ` of explicit rows, without joining them: each `[R_i, P]` -> float64 `[R, R]`, R = Σ R_i.

    Products of the last `known` rows with one another are left out: zeros.
    """
    total = sum(t.shape[0] for t in rows)
    fresh = total - known
    gram = rows[0].new_zeros(total, total, dtype=WIDE)
    step = max(1, _tiles.TILE // max(total, 1))
    for start in range(0, rows[0].shape[1], step):
        # widened a tile at a time: float64 copies of all rows would be twice their memory
        wide = [t[:, start : start + step].to(WIDE) for t in rows]
        tile = wide[0] if len(wide) == 1 else torch.cat(wide)
        # known rows stand last, so their products with one another are the corner left out
        gram[:fresh].addmm_(tile[:fresh], tile.T)
    gram[fresh:, :fresh] = gram[:fresh, fresh:].T
    return gram


@row_gram.fake
def _(rows: Sequence[Tensor], known: int = 0) -> Tensor:
    return square(rows)


row_gram.triton("explicit")
