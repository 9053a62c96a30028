"""Large parameters of which no rank takes in all uses: a rank's memory is the same, however many ranks there are.

Rows that are explicit are cut by columns: each rank has 1/W of the columns of all R rows, and sums
its share of the products. Factors cannot be cut, since each product needs both sides: they go around
in a ring, so that a rank has its own and those of one other. Every pair of ranks meets once.

    bytes a rank sends: explicit rows  U (W - 1) / W
                        factors        U W / 2 at most
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtu_fast._distributed.packing import Parcel, Parts, packed, unpacked
from mtu_fast._distributed.ranks import Ranks
from mtu_fast._rows.uses import Dense

WHAT = "rows.gram: uses"
# (rank -> its uses of a parameter) are multiplied: all pairs, or those of two ranks
Multiply = Callable[[dict[int, Parts]], None]
MultiplyPair = Callable[[int, Parts], None]


def is_dense(uses: Parts) -> bool:
    """Whether all uses are explicit rows."""
    return all(isinstance(use, Dense) for use in uses.values())


def by_columns(ranks: Ranks, uses: Parts, multiply: Multiply, device: torch.device) -> None:
    """Each rank multiplies its columns of the explicit rows of all ranks.

    Args:
        ranks: who takes part.
        uses: this rank's of one parameter, explicit; none is possible.
        multiply: takes the columns of all ranks' rows, {rank: uses}.
        device: where they are wanted.
    """
    pieces: list[Tensor] = []
    mine: Parts = {}
    for rank in range(ranks.size):
        cut: Parts = {k: _columns(use.matrix(), rank, ranks.size) for k, use in uses.items()}
        if rank == ranks.rank:
            mine = cut
            # its own columns need not travel
            pieces.append(_NOTHING)
        else:
            pieces.append(packed(cut, ranks.wire).bytes_of() if cut else _NOTHING)
    sizes = ranks.gathered(WHAT, [len(piece) for piece in pieces])
    came = ranks.exchanged(WHAT, pieces, [of_rank[ranks.rank] for of_rank in sizes], device)
    found = {rank: unpacked(piece) for rank, piece in enumerate(came) if len(piece)}
    if mine:
        found[ranks.rank] = mine
    multiply(found)


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _columns(rows: Tensor, rank: int, size: int) -> Dense:
    # rounded up: the last ranks may have fewer columns, or none
    width = -(-rows.shape[1] // size)
    own = rows[:, rank * width : (rank + 1) * width].contiguous()
    return Dense((own.shape[1],), own)


def around(
    ranks: Ranks,
    parcel: Parcel | None,
    sizes: Sequence[int],
    multiply: MultiplyPair,
    device: torch.device,
) -> None:
    """Uses go around: each rank multiplies its own with those of one rank after another.

    Args:
        ranks: who takes part.
        parcel: this rank's uses of one parameter; None where it has none.
        sizes: bytes of each rank's parcel.
        multiply: takes a rank and its uses.
        device: where they are wanted.
    """
    size, own = ranks.size, ranks.rank
    mine = _NOTHING if parcel is None else parcel.bytes_of()
    for step in range(1, size // 2 + 1):
        to, of = (own + step) % size, (own - step) % size
        pieces, expected = [_NOTHING] * size, [0] * size
        if _works(to, own, step, size):
            pieces[to] = mine
        if _works(own, of, step, size):
            expected[of] = sizes[of]
        # every rank takes part in each step, with nothing if need be: it is a collective
        came = ranks.exchanged(WHAT, pieces, expected, device)
        if len(came[of]):
            multiply(of, unpacked(came[of]))


def _works(rank: int, other: int, step: int, size: int) -> bool:
    """Whether a rank multiplies the uses of the other, which is `step` places before it."""
    # half way round each pair would meet twice: the lower rank of it does the work
    return 2 * step != size or rank < other
