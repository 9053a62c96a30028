"""The rows of one task of one call, and what rows laid end to end have in common."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from mtu_fast._checks.flags import Flags
from mtu_fast._rows.shared import Shared, version
from mtu_fast._rows.uses import Dense, Use
from mtu_fast.methods import SUBSPACE, Roles

Span = tuple[int, int]  # rows start .. stop - 1 of all
Spans = tuple[Span, ...]


@dataclass(frozen=True)
class Everywhere:
    """The rows of one task of one call on all ranks, rank after rank.

    Attributes:
        roles: what each row is.
        counts: how many each rank holds.
        sliced: every rank holds all of them, and of each its slice of the parameters.
        samples: of a mean row, how many samples of all ranks it is the mean of; None where every
            rank has the same batch, and of others.
    """

    roles: Roles
    counts: tuple[int, ...]
    sliced: bool = False
    samples: int | None = None


@dataclass(frozen=True)
class Formed:
    """The rows of a step that are not to be forgotten, explicit.

    Attributes:
        matrix: `[K, ΣP]`, parameters' columns in their order (`columns.py`).
        counts: how many of each part.
        at: which of all rows they are, int64 `[K]`, ascending.
        count: of all rows.
        factors: the parameters that have no columns.
    """

    matrix: Tensor
    counts: list[int]
    at: Tensor
    count: int
    factors: frozenset[int]


@dataclass(frozen=True)
class Joined:
    """The roles of all rows of a call, joined once.

    Attributes:
        parts: of each task.
        roles: of all.
    """

    parts: tuple[Roles, ...]
    roles: Roles

    @staticmethod
    def of(parts: Sequence[Roles]) -> Joined:
        """These laid end to end."""
        return Joined(tuple(parts), join_roles(parts))

    def are(self, parts: Sequence[TaskRows]) -> bool:
        """Whether these are all rows of the call, of this process alone, and no others."""
        if len(parts) != len(self.parts) or any(part.everywhere is not None for part in parts):
            return False
        return all(part.roles is own for part, own in zip(parts, self.parts, strict=True))


@dataclass
class TaskRows:
    """The rows of one task of one call.

    Attributes:
        roles: what each row is.
        uses: parameter index -> the rows' gradients.
        outside: kind -> gradients of the summed row losses by the parameters outside.
        weighted: those of the losses of all tasks of the call, under weights that were known when
            the rows were taken; in place of `outside`.
        versions: of the parameters and of all that the uses hold, when the rows were taken.
        spent: used up by a `backward`.
        persistent: the rows outlive their step: they belong to the point where they were taken, and
            are not used up.
        grams: group of parameters -> Gram of these rows, where they are persistent.
        everywhere: the rows of all ranks that these are a part of; None on one process.
        flags: of the calls they were taken in.
        mean_of: of how many samples the row is the mean, `[]` float64; None where it is one sample's.
        kinds: those of the rows; None where they are to be asked of `roles`.
        matrix: `[R, ΣP]` of which uses that are explicit are columns, of rows in memory; None of
            others.
        reached: the parameters that rows in memory of each task reach, zeros elsewhere.
        formed: some of the rows, explicit, once they were needed.
        joined: roles of all rows of the call, which the first of its parts has.
    """

    roles: Roles
    uses: dict[int, Use]
    outside: dict[int, dict[Tensor, Tensor]]
    versions: tuple[tuple[int, ...], tuple[int, ...]]
    spent: bool = field(default=False)
    persistent: bool = False
    grams: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    everywhere: Everywhere | None = None
    flags: tuple[Flags, ...] = ()
    mean_of: Tensor | None = None
    kinds: frozenset[int] | None = None
    matrix: Tensor | None = None
    reached: Mapping[str, frozenset[int]] = field(default_factory=dict)
    formed: Formed | None = None
    weighted: dict[Tensor, Tensor] = field(default_factory=dict)
    joined: Joined | None = None
    _held: list[Tensor] | None = field(default=None, init=False, repr=False)

    @staticmethod
    def of(
        roles: Roles,
        uses: dict[int, Use],
        outside: dict[int, dict[Tensor, Tensor]],
        shared: Shared,
        flags: Sequence[Flags] = (),
        mean_of: Tensor | None = None,
    ) -> TaskRows:
        """Rows taken now."""
        held = _held_by(uses)
        versions = shared.versions(), _versions(held)
        found = TaskRows(roles, uses, outside, versions, flags=tuple(flags), mean_of=mean_of)
        found._held = held
        return found

    @staticmethod
    def lasting(roles: Roles, uses: dict[int, Use], shared: Shared, kind: int) -> TaskRows:
        """Rows of a kind that outlive their step, of uses that are nobody else's."""
        rows = TaskRows.of(roles, uses, {}, shared)
        return replace(rows, persistent=True, kinds=frozenset((kind,)))

    def to_subspace(self) -> TaskRows:
        """The same rows as rows of a subspace, for later steps."""
        everywhere = self.everywhere
        if everywhere is not None:
            everywhere = replace(everywhere, roles=_of_subspace(everywhere.roles))
        return TaskRows(
            roles=_of_subspace(self.roles),
            uses=dict(self.uses),
            outside={},
            versions=self.versions,
            persistent=True,
            everywhere=everywhere,
            flags=self.flags,
            kinds=frozenset((SUBSPACE,)),
        )

    def use_up(self) -> None:
        """Let go of what the rows hold, unless they are persistent."""
        if not self.persistent:
            self.spent, self.formed, self._held = True, None, None
            self.uses, self.outside, self.weighted = {}, {}, {}

    def changed(self) -> bool:
        """Whether something that the uses hold was written to since."""
        if self._held is None:
            self._held = _held_by(self.uses)
        return self.versions[1] != _versions(self._held)

    @property
    def factors(self) -> frozenset[int]:
        """The parameters whose rows are not explicit."""
        return frozenset(j for j, use in self.uses.items() if not isinstance(use, Dense))

    def only(self, chosen: Container[int]) -> TaskRows:
        """The same rows of some parameters alone."""
        uses = {j: use for j, use in self.uses.items() if j in chosen}
        return replace(self, uses=uses, versions=(self.versions[0], _versions(_held_by(uses))))

    def has(self, kind: int) -> bool:
        """Whether there are rows of a kind, on any rank."""
        if self.kinds is not None and self.everywhere is None:
            return kind in self.kinds
        roles = self.roles if self.everywhere is None else self.everywhere.roles
        return bool((roles.kind == kind).any())

    @property
    def is_mean(self) -> bool:
        """Whether the row is the mean of one over its samples."""
        return self.mean_of is not None

    @property
    def count_everywhere(self) -> int:
        """The number of rows on all ranks."""
        return len(self) if self.everywhere is None else len(self.everywhere.roles)

    def __len__(self) -> int:
        return len(self.roles)


def uses_of(parts: Sequence[TaskRows], j: int) -> tuple[Spans, list[Use]]:
    """The uses of parameter j in rows laid end to end, and which rows each of them has."""
    return uses_of_each(parts, [j]).get(j, ((), []))


def uses_of_each(
    parts: Sequence[TaskRows], group: Collection[int]
) -> dict[int, tuple[Spans, list[Use]]]:
    """The same of some parameters, of those that have any, in their order."""
    spans = _spans(parts)
    tables = [part.uses for part in parts]
    if _are_of_the_same(tables):
        return {j: (spans, [table[j] for table in tables]) for j in group if j in tables[0]}
    return _uses_of_some(tables, spans, group)


def _uses_of_some(
    tables: Sequence[Mapping[int, Use]], spans: Spans, group: Collection[int]
) -> dict[int, tuple[Spans, list[Use]]]:
    """The same where parts reach some parameters each."""
    found: dict[int, tuple[Spans, list[Use]]] = {}
    for j in group:
        there = [i for i, table in enumerate(tables) if j in table]
        if there:
            found[j] = tuple(spans[i] for i in there), [tables[i][j] for i in there]
    return found


def _are_of_the_same(tables: Sequence[Mapping[int, Use]]) -> bool:
    """Whether every part reaches the same parameters, as mostly."""
    return all(table.keys() == tables[0].keys() for table in tables[1:])


def _spans(parts: Sequence[TaskRows]) -> Spans:
    spans: list[Span] = []
    start = 0
    for part in parts:
        stop = start + len(part)
        spans.append((start, stop))
        start = stop
    return tuple(spans)


def all_roles(parts: Sequence[TaskRows]) -> Roles:
    """Roles of the rows of all ranks laid end to end, part after part."""
    joined = parts[0].joined
    if joined is not None and joined.are(parts):
        return joined.roles
    roles = [part.roles if part.everywhere is None else part.everywhere.roles for part in parts]
    return join_roles(roles)


def join_roles(parts: Sequence[Roles]) -> Roles:
    """Roles of rows laid end to end, tasks matched by name."""
    if len(parts) == 1:
        return parts[0]
    # in order of appearance, each once
    tasks = tuple(dict.fromkeys(chain.from_iterable(part.tasks for part in parts)))
    columns: dict[str, list[Tensor]] = {"task": [_renumbered(part, tasks) for part in parts]}
    for name in ("sample", "kind", "loss"):
        columns[name] = [getattr(part, name) for part in parts]
    ranks = [part.rank for part in parts if part.rank is not None]
    if len(ranks) == len(parts):
        columns["rank"] = ranks
    joined = {name: torch.cat(column) for name, column in columns.items()}
    return Roles(**joined, tasks=tasks, dtype=_coarsest(parts), memory=_last_in_memory(parts))


def _last_in_memory(parts: Sequence[Roles]) -> int:
    """How many of the rows are in memory, which are to be the last.

    Raises:
        ValueError: others come after them.
    """
    found = 0
    for part in parts:
        if found and part.memory < len(part):
            raise ValueError("cat: found rows of a memory before others, expected them last.")
        found += part.memory
    return found


def _coarsest(parts: Sequence[Roles]) -> torch.dtype:
    """The lowest precision: that of all rows together."""
    return max((part.dtype for part in parts), key=lambda dtype: torch.finfo(dtype).eps)


def _renumbered(roles: Roles, tasks: tuple[str, ...]) -> Tensor:
    """`roles.task` as indices into other tasks."""
    # by name: calls may have their tasks in another order
    places = [tasks.index(task) for task in roles.tasks]
    first = places[0] if places else 0
    if places == list(range(first, first + len(places))):
        return roles.task + first if first else roles.task
    # numbers that are written there, not brought there
    return torch.stack([roles.task.new_full((), place) for place in places])[roles.task]


def _of_subspace(roles: Roles) -> Roles:
    return replace(roles, kind=torch.full_like(roles.kind, SUBSPACE))


def _held_by(uses: Mapping[int, Use]) -> list[Tensor]:
    return [t for use in uses.values() for t in use.tensors]


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(version, tensors))
