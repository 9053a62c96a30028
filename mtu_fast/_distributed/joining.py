"""From the rows that each rank took to parts of the rows of all ranks: one part a task, on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtu_fast._distributed.alike import check_spaces, fingerprint
from mtu_fast._distributed.ranks import Outcome, Ranks, check_errors, described
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.space import Space
from mtu_fast._rows.task_rows import Everywhere, TaskRows
from mtu_fast.methods import SUBSPACE, Roles

WHAT = "engine.rows"
Counted = tuple[tuple[int, ...], torch.dtype]  # a task's rows on each rank, and their dtype


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others of a call.

    Attributes:
        error: what it found; None where all is well.
        space: stands for the engine's parameters.
        tasks: task -> number of rows, and the name of their dtype.
    """

    error: tuple[int, str] | None
    space: int
    tasks: dict[str, tuple[int, str]]


def joined(ranks: Ranks, taken: Outcome, space: Space, what: str = WHAT) -> list[TaskRows]:
    """This rank's parts of the rows of all ranks.

    Args:
        ranks: who takes part.
        taken: the rows this rank took, or the error it ended in.
        space: the parameters.
        what: the call, for errors.

    Returns:
        A part for each task that a rank has, in one order on all ranks.

    Raises:
        Exception: of the kind that one of the ranks found.
        ValueError: the ranks' engines have different parameters.
    """
    parts: list[TaskRows] = taken.value or []
    tasks = {part.roles.tasks[0]: (len(part), _name(part.roles.dtype)) for part in parts}
    # one collective for errors, engines and tasks: what follows is then alike everywhere
    told = ranks.objects(what, _Told(described(taken.error), fingerprint(space), tasks))
    check_errors([each.error for each in told], taken.error)
    check_spaces([each.space for each in told])
    own = {part.roles.tasks[0]: part for part in parts}
    found, counts = [], []
    for task, (of_ranks, dtype) in _all_tasks(told, ranks.wire).items():
        # parts are the same on all ranks: a task that is missing here has no rows
        found.append(own[task] if task in own else _none_of(task, dtype, space.shared))
        counts.append((of_ranks, dtype))
    everywhere = everywhere_of(ranks, [part.roles for part in found], counts, what)
    return [replace(part, everywhere=e) for part, e in zip(found, everywhere, strict=True)]


def own_rows(parts: Sequence[TaskRows], ranks: Ranks) -> Tensor:
    """Which of the rows of all ranks are this rank's, int64."""
    found, start = [], 0
    for part in parts:
        assert part.everywhere is not None
        counts = part.everywhere.counts
        # within a task the rows lie rank after rank
        first = start + sum(counts[: ranks.rank])
        found.append(torch.arange(first, first + len(part), device=part.roles.task.device))
        start += sum(counts)
    return torch.cat(found)


def in_order_of(tasks: Iterable[str], parts: Sequence[TaskRows], w: Tensor) -> Tensor:
    """Weights of this rank's rows, part after part, in the order of other tasks."""
    pieces = w.split([len(part) for part in parts])
    named = {part.roles.tasks[0]: piece for part, piece in zip(parts, pieces, strict=True)}
    return torch.cat([named[task] for task in tasks])


def given(part: TaskRows, counts: Sequence[int]) -> TaskRows:
    """Explicit rows as a part of those of all ranks, of which `counts` says all that is to be known."""
    like = part.roles
    total = sum(counts)
    roles = Roles(
        task=like.task.new_zeros(total),
        sample=like.sample.new_full((total,), -1),
        kind=like.kind.new_full((total,), SUBSPACE),
        loss=like.loss.new_zeros(total),
        tasks=like.tasks,
        dtype=like.dtype,
        rank=_numbers(counts, like.task.device),
    )
    return replace(part, everywhere=Everywhere(roles, tuple(counts)))


# ---- inside --------------------------------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _all_tasks(told: Sequence[_Told], wire: torch.dtype | None) -> dict[str, Counted]:
    """Task -> rows on each rank, and the lowest precision on a rank that has some, or on the wire."""
    tasks = dict.fromkeys(task for each in told for task in each.tasks)
    found = {}
    for task in tasks:
        counts, dtype = _counted([each.tasks.get(task, (0, "")) for each in told])
        found[task] = counts, dtype if wire is None else _coarser(dtype, wire)
    return found


def _coarser(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _counted(of_ranks: Sequence[tuple[int, str]]) -> Counted:
    counts = tuple(count for count, _ in of_ranks)
    # a rank without rows has a say only where no rank has any
    names = [name for count, name in of_ranks if count]
    if not names:
        names = [name for _, name in of_ranks if name]
    return counts, _coarser(*(getattr(torch, name) for name in sorted(set(names))))


def _none_of(task: str, dtype: torch.dtype, shared: Shared) -> TaskRows:
    """No rows of a task that other ranks have."""
    device = shared.parameters[0].device
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    roles = Roles(nothing, nothing, nothing, nothing.double(), (task,), dtype)
    return TaskRows.of(roles, {}, {}, shared)


def everywhere_of(
    ranks: Ranks, own: Sequence[Roles], counted: Sequence[Counted], what: str
) -> list[Everywhere]:
    """The rows of each task on all ranks, rank after rank."""
    columns = []
    for roles in own:
        # float64 holds whole numbers up to 2^53: one collective for three columns
        columns.append(torch.stack([roles.sample.double(), roles.kind.double(), roles.loss], 1))
    # [ranks][tasks]: rows of each task on each rank
    of_ranks = list(zip(*(counts for counts, _ in counted), strict=True))
    gathered = ranks.gathered_rows(what, torch.cat(columns), [sum(counts) for counts in of_ranks])
    pieces = [rows.split(counts) for rows, counts in zip(gathered, of_ranks, strict=True)]
    found = []
    for i, (counts, dtype) in enumerate(counted):
        of_task = torch.cat([of_rank[i] for of_rank in pieces])
        of_all = _from_columns(of_task, own[i].tasks, dtype, counts)
        found.append(Everywhere(of_all, counts))
    return found


def _from_columns(
    columns: Tensor, tasks: tuple[str, ...], dtype: torch.dtype, counts: Sequence[int]
) -> Roles:
    sample, kind, loss = columns.unbind(1)
    rank = _numbers(counts, columns.device)
    return Roles(
        task=torch.zeros_like(rank),
        sample=sample.long(),
        kind=kind.long(),
        # a view would keep the other columns in memory
        loss=loss.clone(),
        tasks=tasks,
        dtype=dtype,
        rank=rank,
    )


def _numbers(counts: Sequence[int], device: torch.device) -> Tensor:
    """The rank of every row."""
    of_ranks = [torch.full((n,), rank, dtype=torch.int64) for rank, n in enumerate(counts)]
    return torch.cat(of_ranks).to(device)
