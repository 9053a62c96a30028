"""Rows of which every rank has a slice, from whole vectors and back."""

from __future__ import annotations

from dataclasses import replace

from mtu_fast._distributed.ranks import Ranks
from mtu_fast._distributed.slices import Slices
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import Everywhere, TaskRows
from mtu_fast._rows.uses import Dense, Use
from mtu_fast.methods import SUBSPACE


def sliced(part: TaskRows, ranks: Ranks) -> TaskRows:
    """Rows of which every rank has a slice, said to be so."""
    counts = (len(part),) * ranks.size
    return replace(part, everywhere=Everywhere(part.roles, counts, sliced=True))


def cut(part: TaskRows, shared: Shared, slices: Slices) -> TaskRows:
    """This rank's slices of explicit rows, which all ranks have whole."""
    uses: dict[int, Use] = {}
    for j, use in part.uses.items():
        own = slices.own_rows(shared.parameters[j], use.grounded().rows)
        uses[j] = Dense(tuple(own.shape[1:]), own)
    made = TaskRows.lasting(part.roles, uses, shared, SUBSPACE)
    return sliced(replace(made, kinds=part.kinds), slices.ranks)


def whole(part: TaskRows, shared: Shared, slices: Slices) -> TaskRows:
    """The explicit rows that `cut` cuts; a collective."""
    uses: dict[int, Use] = {}
    for j, use in part.uses.items():
        leaf, own = shared.parameters[j], use.grounded().rows
        rows = slices.gathered_rows("rows: wholes", leaf, own)
        uses[j] = Dense(tuple(rows.shape[1:]), rows)
    return replace(part, uses=uses)
