"""Rows of several ranks kept across steps: each rank keeps its own, and knows what those of the others are."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mtu_fast._checks.states import check_own_rows
from mtu_fast._distributed.joining import everywhere_of
from mtu_fast._distributed.ranks import Ranks, attempt
from mtu_fast._rows.block import Grams, chosen
from mtu_fast._rows.explicit import check_vectors, explicit
from mtu_fast._rows.keeping import keep_factors
from mtu_fast._rows.plain import factors_in, plain_of
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import Everywhere, TaskRows, all_roles
from mtu_fast._rows.uses import Use
from mtu_fast.methods import MEMORY, RETAIN, Roles

WHAT = "Memory"


@dataclass(frozen=True)
class SharedBlock:
    """Kept rows of all ranks, of which this one holds a part.

    Attributes:
        parts: this rank's, one a step and task, with the roles of all ranks' rows in `everywhere`.
        rank: this rank.
        sizes: of each part, the bytes of a number, and for each parameter those of a row: 0 where no row
            reaches it. The same on every rank.
        shared: the parameters.
        grams: none: what is known of products lies with the rank that made them.
    """

    parts: tuple[TaskRows, ...]
    rank: int
    sizes: tuple[tuple[int, ...], ...]
    shared: Shared
    grams: Grams = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(part.count_everywhere for part in self.parts)

    @property
    def roles(self) -> Roles:
        """What the rows of all ranks were in the steps that took them."""
        return all_roles(self.parts)

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row as one process would hold it: the same on every rank.

        That has columns for parameters that no row reaches, too, and one form for the rows of all tasks.
        """
        itemsize, *most = (max(of_parts) for of_parts in zip(*self.sizes, strict=True))
        numels = (p.numel() for p in self.shared.parameters)
        return sum(held or itemsize * n for held, n in zip(most, numels, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        return sum(use.held for part in self.parts for use in part.uses.values())

    def before(self, new: SharedBlock) -> SharedBlock:
        """Both, the new ones last."""
        return replace(self, parts=self.parts + new.parts, sizes=self.sizes + new.sizes)

    def select(self, at: Tensor) -> SharedBlock:
        """The rows at these indices into all ranks' rows, which ascend."""
        parts, sizes, start = [], [], 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            stop = start + part.count_everywhere
            mine = at[(at >= start) & (at < stop)] - start
            start = stop
            if len(mine):
                parts.append(selected(part, mine, self.rank))
                sizes.append(size)
        return replace(self, parts=tuple(parts), sizes=tuple(sizes))


class Keeping:
    """What is kept of rows over ranks."""

    ranks: Ranks
    _shared: Shared
    _parts: Sequence[TaskRows]

    def check_open(self) -> None:
        """The rows of every rank may still be used."""
        raise NotImplementedError

    def taken(
        self, at: Tensor, beside: object, dtype: torch.dtype | None, smallest: bool
    ) -> SharedBlock:
        """The rows at these indices into all ranks' rows, in memory of their own, in a dtype; a collective."""
        self.check_open()
        parts = tuple(self._parts)
        unsized = SharedBlock(parts, self.ranks.rank, ((),) * len(parts), self._shared)
        chosen = unsized.select(at).parts
        factors = self._factors(chosen, smallest)

        def own() -> list[TaskRows]:
            return [_own(part, factors, self._shared, dtype) for part in chosen]

        return self._block(self.ranks.agreed(WHAT, own))

    def _factors(self, parts: Sequence[TaskRows], smallest: bool) -> frozenset[int]:
        """The parameters of which no rank's rows of a task are explicit; a collective."""
        count, every = sum(part.count_everywhere for part in parts), range(len(self._shared.names))
        some = [part for part in parts if len(part)]

        def explicit_here() -> list[int]:
            return [not keep_factors([p.uses.get(j) for p in some], count, smallest) for j in every]

        mine = attempt(explicit_here)
        told = self.ranks.told(WHAT, mine.error, mine.value or [0] * len(every))
        return frozenset(j for j in every if not any(of_rank[j] for of_rank in told))

    def _block(self, parts: Sequence[TaskRows]) -> SharedBlock:
        """Parts that all ranks have; how large their rows are is told."""
        told = self.ranks.gathered(WHAT, [n for part in parts for n in _sizes(part, self._shared)])
        most = [max(of_ranks) for of_ranks in zip(*told, strict=True)]
        width = 1 + len(self._shared.names)
        sizes = [tuple(most[i * width : (i + 1) * width]) for i in range(len(parts))]
        return SharedBlock(tuple(parts), self.ranks.rank, tuple(sizes), self._shared)

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
        parts = self.ranks.agreed(WHAT, lambda: restored(state, self._shared))
        counts = self.ranks.gathered(WHAT, [len(part) for part in parts])
        counted = []
        for part, of_ranks in zip(parts, zip(*counts, strict=True), strict=True):
            counted.append((of_ranks, part.roles.dtype))
        roles = [part.roles for part in parts]
        everywhere = everywhere_of(self.ranks, roles, counted, WHAT)
        held = [replace(part, everywhere=e) for part, e in zip(parts, everywhere, strict=True)]
        return self._block(held)


def _sizes(part: TaskRows, shared: Shared) -> list[int]:
    """Bytes of a number, and for each parameter of a row of this rank's; 0 where it has none."""
    uses = part.uses if len(part) else {}
    explicit = {j: use.tensors[0].itemsize for j, use in uses.items() if j not in part.factors}
    # of slices, too, a whole row is meant
    held = {j: shared.parameters[j].numel() * itemsize for j, itemsize in explicit.items()}
    held |= {j: use.held // use.count for j, use in uses.items() if j in part.factors}
    return [max(explicit.values(), default=0), *(held.get(j, 0) for j in range(len(shared.names)))]


def _state_of(part: TaskRows, shared: Shared) -> dict[str, Any]:
    roles, factors = part.roles, part.factors
    return {
        "vectors": {
            shared.names[j]: u.tensors[0] for j, u in part.uses.items() if j not in factors
        },
        "factors": {shared.names[j]: [plain_of(part.uses[j])] for j in sorted(factors)},
        "task": roles.tasks[0],
        "sample": roles.sample,
        "loss": roles.loss,
        "dtype": roles.dtype,
    }


def restored(state: Mapping[str, Any], shared: Shared) -> list[TaskRows]:
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
        roles = _with_columns(made.roles, held)
        uses = made.uses | _factors(f"Memory: state: parts[{i}]: factors", held, shared)
        lasting = TaskRows.lasting(roles, uses, shared, RETAIN)
        found.append(replace(lasting, kinds=None))
    return found


def _factors(name: str, held: Mapping[str, Any], shared: Shared) -> dict[int, Use]:
    shapes = {n: tuple(p.shape) for n, p in zip(shared.names, shared.parameters, strict=True)}
    found = factors_in(name, held["factors"], shapes, [len(held["sample"])])
    return {shared.names.index(key): use for key, (use,) in found.items()}


def _with_columns(roles: Roles, state: Mapping[str, Any]) -> Roles:
    device = roles.loss.device
    sample, loss = state["sample"].to(device), state["loss"].to(device)
    task = torch.zeros_like(sample)
    return replace(roles, task=task, kind=torch.full_like(sample, RETAIN), sample=sample, loss=loss)


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


def _own(
    part: TaskRows, factors: Container[int], shared: Shared, dtype: torch.dtype | None
) -> TaskRows:
    """The rows in memory of their own, explicit but for some parameters."""
    uses: dict[int, Use] = {}
    for j, use in part.uses.items() if len(part) else ():
        kept = use if j in factors else use.grounded()
        copied = kept.with_tensors(*(t.clone() for t in kept.tensors))
        uses[j] = copied if dtype is None else copied.to(dtype)
    own = TaskRows.lasting(part.roles, uses, shared, RETAIN)
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
