"""Rows of several ranks kept across steps: each rank keeps its own, and knows what those of the others are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mtu_fast._checks.states import check_own_rows
from mtu_fast._distributed.joining import everywhere_of
from mtu_fast._distributed.ranks import Ranks
from mtu_fast._rows.block import Grams, chosen
from mtu_fast._rows.explicit import check_vectors, explicit
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import Everywhere, TaskRows, all_roles
from mtu_fast._rows.uses import Use
from mtu_fast.methods import MEMORY, RETAIN, Roles

WHAT = "Memory"


@dataclass(frozen=True)
class SharedBlock:
    """Explicit rows of all ranks, of which this one holds a part.

    Attributes:
        parts: this rank's, one a step and task, with the roles of all ranks' rows in `everywhere`.
        rank: this rank.
        numel: numbers of a row.
        itemsize: bytes of a number.
        grams: none: what is known of products lies with the rank that made them.
    """

    parts: tuple[TaskRows, ...]
    rank: int
    numel: int
    itemsize: int
    grams: Grams = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(part.count_everywhere for part in self.parts)

    @property
    def roles(self) -> Roles:
        """What the rows of all ranks were in the steps that took them."""
        return all_roles(self.parts)

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row, whoever holds it: the same on every rank."""
        return self.numel * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        return sum(use.held for part in self.parts for use in part.uses.values())

    def to(self, dtype: torch.dtype | None) -> SharedBlock:
        """They in another dtype; None for as they are."""
        if dtype is None:
            return self
        parts = []
        for part in self.parts:
            parts.append(_with_uses(part, lambda use: use.with_tensors(use.tensors[0].to(dtype))))
        return replace(self, parts=tuple(parts), itemsize=dtype.itemsize)

    def before(self, new: SharedBlock) -> SharedBlock:
        """Both, the new ones last."""
        return replace(self, parts=self.parts + new.parts)

    def select(self, at: Tensor) -> SharedBlock:
        """The rows at these indices into all ranks' rows, which ascend."""
        parts, start = [], 0
        for part in self.parts:
            stop = start + part.count_everywhere
            mine = at[(at >= start) & (at < stop)] - start
            start = stop
            if len(mine):
                parts.append(selected(part, mine, self.rank))
        return replace(self, parts=tuple(parts))


class Keeping:
    """What is kept of rows over ranks."""

    ranks: Ranks
    _shared: Shared
    _parts: Sequence[TaskRows]

    def check_open(self) -> None:
        """The rows of every rank may still be used."""
        raise NotImplementedError

    def taken(self, at: Tensor) -> SharedBlock:
        """The rows at these indices into all ranks' rows, explicit, in memory of their own."""
        self.check_open()
        whole = _block(self._parts, self.ranks, self._shared).select(at)
        held = [_explicit(part, self._shared) for part in whole.parts]
        return replace(whole, parts=tuple(held))

    def remembered(self, block: SharedBlock) -> list[TaskRows]:
        """Rows as rows of kind MEMORY that outlive a step."""
        return [_as(part, MEMORY) for part in block.parts]

    def state_of(self, block: SharedBlock) -> dict[str, Any]:
        """What `block_of` takes: of each part this rank's rows, as plain values and tensors."""
        return {"parts": [_state_of(part, self._shared) for part in block.parts]}

    def block_of(self, state: Mapping[str, Any]) -> SharedBlock:
        """What `state_of` gave on every rank; a collective.

        Raises:
            Exception: of the kind that one of the ranks found.
        """
        parts = self.ranks.agreed(WHAT, lambda: _restored(state, self._shared))
        counts = self.ranks.gathered(WHAT, [len(part) for part in parts])
        counted = []
        for part, of_ranks in zip(parts, zip(*counts, strict=True), strict=True):
            counted.append((of_ranks, part.roles.dtype))
        roles = [part.roles for part in parts]
        everywhere = everywhere_of(self.ranks, roles, counted, WHAT)
        held = [replace(part, everywhere=e) for part, e in zip(parts, everywhere, strict=True)]
        return _block(held, self.ranks, self._shared)


def _block(parts: Sequence[TaskRows], ranks: Ranks, shared: Shared) -> SharedBlock:
    numel = sum(p.numel() for p in shared.parameters)
    itemsize = max(p.dtype.itemsize for p in shared.parameters)
    return SharedBlock(tuple(parts), ranks.rank, numel, itemsize)


def _state_of(part: TaskRows, shared: Shared) -> dict[str, Any]:
    roles = part.roles
    return {
        "vectors": {shared.names[j]: use.tensors[0] for j, use in part.uses.items()},
        "task": roles.tasks[0],
        "sample": roles.sample,
        "loss": roles.loss,
        "dtype": roles.dtype,
    }


def _restored(state: Mapping[str, Any], shared: Shared) -> list[TaskRows]:
    """This rank's rows of each part of a state.

    Raises:
        TypeError: a part of another kind.
        ValueError: a part is missing, or vectors do not fit the parameters.
    """
    if "parts" not in state:
        raise ValueError(
            "Memory: state: found the rows of one process, expected those of a rank, as state_dict gives them there; "
            "mtu.unlearn deals the rows of its checkpoint out anew."
        )
    found = []
    for i, part in enumerate(state["parts"]):
        held = check_own_rows(f"Memory: state: parts[{i}]", part)
        check_vectors(held["vectors"], shared)
        made = explicit(shared, held["vectors"], held["task"], held["dtype"])
        found.append(replace(made, roles=_with_columns(made.roles, held), kinds=None))
    return found


def _with_columns(roles: Roles, state: Mapping[str, Any]) -> Roles:
    device = roles.loss.device
    sample, loss = state["sample"].to(device), state["loss"].to(device)
    return replace(roles, kind=torch.full_like(roles.kind, RETAIN), sample=sample, loss=loss)


def selected(part: TaskRows, at: Tensor, rank: int) -> TaskRows:
    """Some of the rows of all ranks: what of them is this rank's."""
    assert part.everywhere is not None
    before = part.everywhere
    if before.sliced:
        # every rank has a slice of every row
        own, counts = at, (len(at),) * len(before.counts)
    else:
        starts = torch.tensor([0, *before.counts], device=at.device).cumsum(0)
        # rank after rank: where its rows begin says whose a row is
        holder = torch.searchsorted(starts, at, right=True) - 1
        counts = tuple(torch.bincount(holder, minlength=len(before.counts)).tolist())
        own = at[holder == rank] - starts[rank]
    everywhere = Everywhere(chosen(before.roles, at), counts, before.sliced)
    mine = replace(part, roles=chosen(part.roles, own), everywhere=everywhere)
    if len(own) == len(part):
        return mine
    return _with_uses(mine, lambda use: use.select(own))


def _explicit(part: TaskRows, shared: Shared) -> TaskRows:
    """The rows as vectors that are nobody else's."""
    uses: dict[int, Use] = {}
    for j, use in part.uses.items() if len(part) else ():
        dense = use.grounded()
        uses[j] = dense.with_tensors(dense.rows.clone())
    own = TaskRows.explicit(part.roles, uses, shared, RETAIN)
    return replace(own, everywhere=part.everywhere)


def _as(part: TaskRows, kind: int) -> TaskRows:
    assert part.everywhere is not None
    everywhere = replace(part.everywhere, roles=_roles_as(part.everywhere.roles, kind))
    return replace(part, roles=_roles_as(part.roles, kind), everywhere=everywhere, kinds=None)


def _roles_as(roles: Roles, kind: int) -> Roles:
    return replace(roles, kind=torch.full_like(roles.kind, kind), memory=len(roles))


def _with_uses(part: TaskRows, function: Callable[[Use], Use]) -> TaskRows:
    uses = {j: function(use) for j, use in part.uses.items()}
    # tensors of their own: what they were is counted anew
    versions = part.versions[0], tuple(t._version for use in uses.values() for t in use.tensors)
    return replace(part, uses=uses, versions=versions)
