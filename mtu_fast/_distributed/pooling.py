"""`S G Sᵀ` over ranks, the rows to forget of each task added up: on their rank, before they travel, where that is less.

A task's rows to forget on one rank are then one explicit row in the place of n. Parameters of which
n rows, as they are held, are fewer bytes than that travel as they are, and are added up in G.

    bytes a rank sends of a parameter of I numbers  ≤  (rows kept + tasks) · I
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mtu_fast._distributed.gram import WHAT, joined_gram
from mtu_fast._distributed.kept import selected
from mtu_fast._distributed.ranks import Ranks, attempt
from mtu_fast._ops._sums import summed_at
from mtu_fast._rows.pool import Pool
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast._rows.uses import Dense, Use
from mtu_fast._rows.validity import check_open
from mtu_fast.methods import FORGET

Groups = Sequence[Sequence[int]]


def pooled_gram(
    ranks: Ranks, parts: Sequence[TaskRows], shared: Shared, groups: Groups, pool: Pool
) -> Tensor:
    """`joined_gram` of the V rows of a pool, the rows of each added up: float64 `[L, V, V]`, alike on every rank."""
    whole = [_Whole(part, into) for part, into in zip(parts, _by_part(parts, pool), strict=True)]
    chosen = _chosen(ranks, whole, parts, shared)
    others = set(range(len(shared.parameters))) - chosen
    found = torch.zeros(len(groups), len(pool.counts), len(pool.counts), dtype=torch.float64)
    if others:
        of_all = [part.only(others) for part in parts]
        gram = joined_gram(ranks, of_all, shared, _within(groups, others))
        found += _added_up(gram, pool.into, len(pool.counts))
    if chosen:
        summed, into = [], []
        for each in whole:
            for part, numbers in each.added_up(chosen, ranks.rank):
                summed.append(part)
                into.append(numbers)
        gram = joined_gram(ranks, summed, shared, _within(groups, chosen))
        found += _added_up(gram, torch.cat(into), len(pool.counts))
    return found


@dataclass(frozen=True)
class _Whole:
    """One part, and which of V rows each of its rows is, on all ranks; -1 for those left out."""

    part: TaskRows
    into: Tensor

    @property
    def forget(self) -> Tensor:
        """Which of the rows of all ranks are added up."""
        assert self.part.everywhere is not None
        return (self.part.everywhere.roles.kind == FORGET) & (self.into >= 0)

    def own(self, rank: int) -> Tensor:
        """Which of this rank's rows are added up, as indices into these."""
        assert self.part.everywhere is not None
        return self.forget.split(list(self.part.everywhere.counts))[rank].nonzero().flatten()

    def added_up(self, chosen: Collection[int], rank: int) -> list[tuple[TaskRows, Tensor]]:
        """The rows that stay, and one for those of each rank that are added up; with which of V rows these are."""
        part, found = self.part.only(chosen), []
        forget = self.forget
        rest = (~forget & (self.into >= 0)).nonzero().flatten()
        if len(rest):
            found.append((selected(part, rest, rank), self.into[rest]))
        if bool(forget.any()):
            found.append(self._sums(part, rank))
        return found

    def _sums(self, part: TaskRows, rank: int) -> tuple[TaskRows, Tensor]:
        assert part.everywhere is not None and part.everywhere.roles.rank is not None
        at = self.forget.nonzero().flatten()
        holder = part.everywhere.roles.rank[at]
        # a rank's rows lie together: the first of them stands for their sum
        opens = torch.cat([holder.new_ones(1, dtype=torch.bool), holder[1:] != holder[:-1]])
        first, own = at[opens], self.own(rank)
        stub = selected(replace(part, uses={}), first, rank)
        uses: dict[int, Use] = {}
        for j, use in part.uses.items() if len(own) else ():
            total = use.select(own).weighted(None)
            uses[j] = Dense(use.shape, total.view(1, *use.shape), chain=use.chain)
        versions = part.versions[0], tuple(t._version for u in uses.values() for t in u.tensors)
        return replace(stub, uses=uses, versions=versions), self.into[first]

    def saved(self, j: int, rank: int) -> int:
        """Bytes that this rank does not send of a parameter where rows are added up."""
        own = self.own(rank)
        if j not in self.part.uses or not len(own):
            return 0
        use = self.part.uses[j]
        row = torch.Size(use.shape).numel() * use.dtype.itemsize
        return use.held * len(own) // len(self.part) - row


def _chosen(
    ranks: Ranks, whole: Sequence[_Whole], parts: Sequence[TaskRows], shared: Shared
) -> set[int]:
    """The parameters whose rows are added up before they travel."""
    opened = attempt(partial(check_open, parts, shared))
    number = range(len(shared.parameters))
    saved = [0 for _ in number]
    if opened.error is None:
        saved = [sum(each.saved(j, ranks.rank) for each in whole) for j in number]
    told = ranks.told(WHAT, opened.error, saved)
    return {j for j in number if sum(of_rank[j] for of_rank in told) > 0}


def _by_part(parts: Sequence[TaskRows], pool: Pool) -> tuple[Tensor, ...]:
    return pool.into.split([part.count_everywhere for part in parts])


def _within(groups: Groups, chosen: Collection[int]) -> Groups:
    return [[j for j in group if j in chosen] for group in groups]


def _added_up(gram: Tensor, into: Tensor, rows: int) -> Tensor:
    """`S G Sᵀ`, `[L, V, V]`."""
    kept = into >= 0
    at = into[kept]
    # rows, then columns
    half = summed_at(at, gram[:, kept].transpose(0, 1), rows)  # [V, L, R]
    return summed_at(at, half[:, :, kept].movedim(2, 0), rows).permute(2, 1, 0).contiguous()
