"""From the rows that each rank took to parts of the rows of all ranks: one part a task, on every rank."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtu_fast._checks.values import all_finite
from mtu_fast._distributed.ranks import Outcome, Ranks, described, raise_first
from mtu_fast._distributed.sums import in_buckets
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.space import Space
from mtu_fast._rows.task_rows import Everywhere, TaskRows
from mtu_fast._rows.uses import Dense, Gather, Several, Use
from mtu_fast._rows.validity import KINDS
from mtu_fast.errors import NotFiniteError
from mtu_fast.methods import SUBSPACE, Roles

WHAT = "engine.rows"
Role = tuple[str, int]  # (task, kind)


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
    told = ranks.objects(what, _Told(described(taken.error), fingerprint(space), tasks))
    _check_errors([each.error for each in told], taken.error)
    _check_spaces([each.space for each in told])
    own = {part.roles.tasks[0]: part for part in parts}
    everywhere = _all_tasks(told)
    found = []
    for task, (_, dtype) in everywhere.items():
        found.append(own[task] if task in own else _none_of(task, dtype, space.shared))
    counts = [counts for counts, _ in everywhere.values()]
    roles = _roles_everywhere(ranks, [part.roles for part in found], counts, what)
    for k, (_, dtype) in enumerate(everywhere.values()):
        of_all = Everywhere(replace(roles[k], dtype=dtype), counts[k])
        found[k] = replace(found[k], everywhere=of_all)
    return found


def own_rows(parts: Sequence[TaskRows], ranks: Ranks) -> Tensor:
    """Which of the rows of all ranks are this rank's, int64."""
    found, start = [], 0
    for part in parts:
        assert part.everywhere is not None
        counts = part.everywhere.counts
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


def fingerprint(space: Space) -> int:
    """A number that engines of the same parameters share."""
    shared = space.shared
    inside = zip(shared.names, map(_kind, shared.parameters), strict=True)
    outside = map(_kind, space.outside.values())
    return zlib.crc32(repr((list(inside), list(outside), shared.precision)).encode())


def _kind(p: Tensor) -> tuple[object, ...]:
    return tuple(p.shape), str(p.dtype)


def check_alike(ranks: Ranks, parameters: Iterable[Tensor]) -> None:
    """Every rank holds the same numbers.

    Raises:
        ValueError: some differ.
    """
    bits = repr([_bits(p) for p in parameters]).encode()
    sums = ranks.gathered(WHAT, [zlib.crc32(bits)])
    differ = [rank for rank, of_rank in enumerate(sums) if of_rank != sums[0]]
    if differ:
        raise ValueError(
            f"model: found other numbers on rank {differ[0]} than on rank 0, expected copies of "
            "one model: load the same weights on every rank, or broadcast those of rank 0."
        )


def _bits(p: Tensor) -> int:
    """The sum of a parameter's bits as whole numbers, whatever the order."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = p.detach().contiguous().view(-1).view(whole[p.element_size()])
    return int(flat.sum(dtype=torch.int64))


# ---- mean rows -----------------------------------------------------------------------------------


def totals(ranks: Ranks, counted: Outcome, space: Space) -> dict[Role, int]:
    """How many samples each (task, kind) has on all ranks, in one order.

    Args:
        ranks: who takes part.
        counted: {(task, kind): samples} of this rank, or the error it ended in.
        space: the parameters.

    Returns:
        {(task, kind): samples}, tasks in order of appearance, kinds in theirs.

    Raises:
        Exception: of the kind that one of the ranks found.
        ValueError: the ranks' engines have different parameters.
    """
    told = ranks.objects(WHAT, (described(counted.error), fingerprint(space), counted.value))
    _check_errors([error for error, _, _ in told], counted.error)
    _check_spaces([of_rank for _, of_rank, _ in told])
    sums: dict[Role, int] = {}
    for _, _, of_rank in told:
        for role, count in of_rank.items():
            sums[role] = sums.get(role, 0) + count
    tasks = list(dict.fromkeys(task for task, _ in sums))
    order = sorted(sums, key=lambda role: (tasks.index(role[0]), role[1]))
    return {role: sums[role] for role in order}


def summed_means(
    ranks: Ranks, taken: Outcome, roles: Sequence[Role], space: Space
) -> list[TaskRows]:
    """The mean rows over all ranks, held by rank 0 with what is outside.

    Args:
        ranks: who takes part.
        taken: this rank's shares of the mean rows, or the error it ended in.
        roles: (task, kind) of every mean row.
        space: the parameters.

    Returns:
        A part for each of the roles.

    Raises:
        Exception: of the kind that one of the ranks found.
    """
    shares: list[TaskRows] = [part for part in taken.value or [] if len(part)]
    error = taken.error or _not_finite(shares)
    parameters = [*space.shared.parameters, *ranks.outside()]
    own = {_role(part): _gradients(part, space.shared) for part in shares}
    losses = {_role(part): part.roles.loss for part in shares}
    dtype = max((_code(part.roles.dtype) for part in shares), default=0)
    there = [int(p in own.get(role, {})) for role in roles for p in parameters]
    told = ranks.gathered(WHAT, [error is not None, dtype, *there])
    ranks.check(WHAT, [flag for flag, *_ in told], error)
    reached = [any(flags) for flags in zip(*(of_rank[2:] for of_rank in told), strict=True)]
    lowest = _DTYPES[max(of_rank[1] for of_rank in told)]
    found = []
    for i, role in enumerate(roles):
        wanted = []
        for k, parameter in enumerate(parameters):
            if reached[i * len(parameters) + k]:
                wanted.append(parameter)
        sums = _sums(ranks, own.get(role, {}), wanted)
        loss = ranks.sum(f"{WHAT}: means", losses.get(role, _no_loss(space)))
        found.append(_mean_row(ranks, role, sums, loss, lowest, space.shared))
    return found


def _sums(
    ranks: Ranks, own: Mapping[Tensor, Tensor], wanted: Sequence[Tensor]
) -> dict[Tensor, Tensor]:
    """The sums of all ranks' shares, right on rank 0."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in wanted:
        by_dtype.setdefault(working_dtype(parameter), []).append(parameter)
    reduce = partial(ranks.sum_at, f"{WHAT}: means", rank=0)
    found: dict[Tensor, Tensor] = {}
    for dtype, those in by_dtype.items():
        found |= in_buckets(reduce, those, own, dtype)
    return found


def _mean_row(
    ranks: Ranks,
    role: Role,
    sums: Mapping[Tensor, Tensor],
    loss: Tensor,
    dtype: torch.dtype,
    shared: Shared,
) -> TaskRows:
    """A mean row as a part: the row on rank 0, nothing elsewhere."""
    task, kind = role
    first = torch.zeros(1, dtype=torch.int64, device=loss.device)
    roles = Roles(
        task=first,
        sample=torch.full_like(first, -1),
        kind=torch.full_like(first, kind),
        loss=loss,
        tasks=(task,),
        dtype=dtype,
    )
    counts = (1,) + (0,) * (ranks.size - 1)
    everywhere = Everywhere(replace(roles, rank=first), counts)
    uses: dict[int, Use] = {}
    outside: dict[Tensor, Tensor] = {}
    if ranks.rank == 0:
        inside = {parameter: j for j, parameter in enumerate(shared.parameters)}
        for parameter, g in sums.items():
            if parameter in inside:
                uses[inside[parameter]] = Dense(tuple(parameter.shape), g[None])
            else:
                outside[parameter] = g.to(parameter.dtype)
    else:
        roles = _no_rows(roles)
    part = TaskRows.of(roles, uses, {kind: outside}, shared)
    return replace(part, everywhere=everywhere)


def _gradients(part: TaskRows, shared: Shared) -> dict[Tensor, Tensor]:
    """The share of a mean row, inside and outside."""
    found = {}
    for j, use in part.uses.items():
        found[shared.parameters[j]] = use.grounded().rows[0]
    for outside in part.outside.values():
        for parameter, g in outside.items():
            found[parameter] = g.to_dense() if g.is_sparse else g
    return found


def _no_loss(space: Space) -> Tensor:
    return torch.zeros(1, dtype=torch.float64, device=space.shared.parameters[0].device)


def _role(part: TaskRows) -> Role:
    return part.roles.tasks[0], int(part.roles.kind[0])


def _not_finite(shares: Sequence[TaskRows]) -> NotFiniteError | None:
    for part in shares:
        tensors = [t for use in part.uses.values() for t in use.tensors]
        tensors += [g for outside in part.outside.values() for g in outside.values()]
        if not all_finite(tensors):
            task, kind = _role(part)
            return NotFiniteError(
                f"rows: the mean gradient of {task!r} {KINDS[kind]} is not finite although its "
                "losses are; .grad is untouched. Guard it in the loss."
            )
    return None


# ---- inside --------------------------------------------------------------------------------------

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # by precision


def _code(dtype: torch.dtype) -> int:
    return _DTYPES.index(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_errors(errors: Sequence[tuple[int, str] | None], own: Exception | None) -> None:
    if any(error is not None for error in errors):
        raise_first(errors, own)


def _check_spaces(spaces: Sequence[int]) -> None:
    differ = [rank for rank, space in enumerate(spaces) if space != spaces[0]]
    if differ:
        raise ValueError(
            f"engine: found other parameters (names, shapes, dtypes) or another precision on rank "
            f"{differ[0]} than on rank 0, expected engines made alike on every rank."
        )


def _all_tasks(told: Sequence[_Told]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Task -> rows on each rank, and the lowest precision on a rank that has some."""
    found = {}
    for task in dict.fromkeys(task for each in told for task in each.tasks):
        those = [each.tasks.get(task, (0, "")) for each in told]
        counts = tuple(count for count, _ in those)
        names = [name for count, name in those if count] or [name for _, name in those if name]
        dtypes: list[torch.dtype] = [getattr(torch, name) for name in names]
        found[task] = counts, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return found


def _none_of(task: str, dtype: torch.dtype, shared: Shared) -> TaskRows:
    """No rows of a task that other ranks have."""
    device = shared.parameters[0].device
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    roles = Roles(nothing, nothing, nothing, nothing.double(), (task,), dtype)
    return TaskRows.of(roles, {}, {}, shared)


def _no_rows(roles: Roles) -> Roles:
    return replace(
        roles,
        task=roles.task[:0],
        sample=roles.sample[:0],
        kind=roles.kind[:0],
        loss=roles.loss[:0],
        rank=None,
    )


def _roles_everywhere(
    ranks: Ranks, own: Sequence[Roles], counts: Sequence[Sequence[int]], what: str
) -> list[Roles]:
    """The roles of each task's rows on all ranks, rank after rank; counts of a task, of a rank."""
    columns = []
    for roles in own:
        columns.append(torch.stack([roles.sample.double(), roles.kind.double(), roles.loss], 1))
    of_ranks = ranks.gathered_rows(what, torch.cat(columns), [*map(sum, zip(*counts, strict=True))])
    pieces = []
    for rank, rows in enumerate(of_ranks):
        pieces.append(rows.split([of_task[rank] for of_task in counts]))
    found = []
    for k, roles in enumerate(own):
        sample, kind, loss = torch.cat([of_rank[k] for of_rank in pieces]).unbind(1)
        rank_of = _numbers(counts[k], sample.device)
        found.append(
            Roles(
                task=torch.zeros_like(rank_of),
                sample=sample.long(),
                kind=kind.long(),
                loss=loss.clone(),
                tasks=roles.tasks,
                dtype=roles.dtype,
                rank=rank_of,
            )
        )
    return found


def _numbers(counts: Sequence[int], device: torch.device) -> Tensor:
    """The rank of every row."""
    of_ranks = [torch.full((n,), rank, dtype=torch.int64) for rank, n in enumerate(counts)]
    return torch.cat(of_ranks).to(device)


def check_dense(parts: Sequence[TaskRows], shared: Shared) -> None:
    """No table has sparse gradients: their entries would have to be joined over ranks.

    Raises:
        ValueError: one has.
    """
    for part in parts:
        for j, use in part.uses.items():
            several: Sequence[Any] = use.parts if isinstance(use, Several) else (use,)
            if any(isinstance(each, Gather) and each.sparse for each in several):
                raise ValueError(
                    f"{shared.names[j]}: found sparse gradients (sparse=True), expected dense ones "
                    "where rows of several ranks are joined; make the embedding with sparse=False."
                )
