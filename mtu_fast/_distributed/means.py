"""Mean rows over all ranks: each rank's share of them, summed where they are held, on rank 0."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtu_fast._checks.values import all_finite
from mtu_fast._distributed.alike import check_spaces, fingerprint
from mtu_fast._distributed.ranks import Outcome, Ranks, check_errors, described
from mtu_fast._distributed.slices import Slices
from mtu_fast._distributed.streaming import Stream
from mtu_fast._distributed.sums import in_buckets
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.space import Space
from mtu_fast._rows.task_rows import Everywhere, TaskRows
from mtu_fast._rows.uses import Dense, Use
from mtu_fast._rows.validity import KINDS
from mtu_fast.errors import NotFiniteError
from mtu_fast.methods import Roles

WHAT = "engine.rows"
Role = tuple[str, int]  # (task, kind)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # by precision


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
    mine = described(counted.error), fingerprint(space), counted.value
    told = ranks.objects(f"{WHAT}: means", mine)
    check_errors([error for error, _, _ in told], counted.error)
    check_spaces([of_rank for _, of_rank, _ in told])
    sums: dict[Role, int] = {}
    for _, _, of_rank in told:
        for role, count in of_rank.items():
            sums[role] = sums.get(role, 0) + count
    # tasks as the first rank that has them knows them: an order that all ranks share
    tasks = list(dict.fromkeys(task for task, _ in sums))
    order = sorted(sums, key=lambda role: (tasks.index(role[0]), role[1]))
    return {role: sums[role] for role in order}


def summed_means(
    ranks: Ranks, taken: Outcome, counts: Mapping[Role, int], space: Space
) -> list[TaskRows]:
    """The mean rows over all ranks, held by rank 0 with what is outside.

    Args:
        ranks: who takes part.
        taken: this rank's shares of the mean rows, or the error it ended in.
        counts: {(task, kind) of every mean row: its samples}, in one order on all ranks.
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
    dtype = _lowest(ranks, error, shares)
    wanted = _reached(ranks, own, list(counts), parameters)
    found = []
    # collectives in the order of the counts
    for role in counts:
        sums = _sums(ranks, own.get(role, {}), wanted[role])
        loss = ranks.sum(f"{WHAT}: means", losses.get(role, _no_loss(space)))
        found.append(_mean_row(ranks, role, sums, loss, dtype, space.shared))
    return _counted(found, counts)


def sliced_means(
    ranks: Ranks,
    slices: Slices,
    taken: Outcome,
    counts: Mapping[Role, int],
    space: Space,
    stream: Stream,
) -> list[TaskRows]:
    """The mean rows over all ranks, of which each holds its slice of the parameters.

    Args:
        ranks: who takes part.
        slices: how parameters are held.
        taken: this rank's shares of the mean rows, or the error it ended in.
        counts: {(task, kind) of every mean row: its samples}, in one order on all ranks.
        space: the parameters.
        stream: what was summed while rows were taken; the shares have the rest.

    Returns:
        A part for each of the roles.

    Raises:
        Exception: of the kind that one of the ranks found.
    """
    shares: list[TaskRows] = [part for part in taken.value or [] if len(part)]
    error = taken.error or _not_finite(shares, stream.not_finite)
    parameters = [*space.shared.parameters, *ranks.outside()]
    own = {_role(part): _gradients(part, space.shared) for part in shares}
    losses = {_role(part): part.roles.loss for part in shares}
    dtype = _lowest(ranks, error, shares)
    streamed = stream.sums()
    found = []
    for role in counts:
        share = own.get(role, {})
        given = (list(share), iter(share.items()))
        sums = slices.scattered(f"{WHAT}: means", lambda: given, parameters, ranks)  # noqa: B023
        sums |= streamed[role]
        loss = ranks.sum(f"{WHAT}: means", losses.get(role, _no_loss(space)))
        found.append(_sliced_row(ranks, role, sums, loss, dtype, space.shared))
    return _counted(found, counts)


def _counted(parts: Sequence[TaskRows], counts: Mapping[Role, int]) -> list[TaskRows]:
    """Mean rows that know of how many samples they are, as every rank does."""
    found = []
    for part, count in zip(parts, counts.values(), strict=True):
        like = part.roles.loss
        found.append(replace(part, mean_of=like.new_tensor(count, dtype=torch.float64)))
    return found


def _sliced_row(
    ranks: Ranks,
    role: Role,
    sums: Mapping[Tensor, Tensor],
    loss: Tensor,
    dtype: torch.dtype,
    shared: Shared,
) -> TaskRows:
    """A mean row as a part: this rank's slice of it."""
    roles = _mean_roles(role, loss, dtype)
    everywhere = Everywhere(
        replace(roles, rank=torch.zeros_like(roles.task)), (1,) * ranks.size, sliced=True
    )
    return replace(_part_of(roles, sums, role, shared), everywhere=everywhere)


def _lowest(ranks: Ranks, error: Exception | None, shares: Sequence[TaskRows]) -> torch.dtype:
    """The lowest precision that a rank's graph computes in, if no rank has found an error."""
    # a higher place is a lower precision; a rank without rows lowers nothing
    mine = max((_DTYPES.index(part.roles.dtype) for part in shares), default=0)
    return _DTYPES[max(code for (code,) in ranks.told(WHAT, error, [mine]))]


def _reached(
    ranks: Ranks,
    own: Mapping[Role, Mapping[Tensor, Tensor]],
    roles: Sequence[Role],
    parameters: Sequence[Tensor],
) -> dict[Role, list[Tensor]]:
    """Per role, the parameters of which a rank has a share."""
    mine = []
    for role in roles:
        share = own.get(role, {})
        mine += [int(parameter in share) for parameter in parameters]
    flags = iter(map(max, zip(*ranks.gathered(WHAT, mine), strict=True)))
    return {role: [p for p in parameters if next(flags)] for role in roles}


def _sums(
    ranks: Ranks, own: Mapping[Tensor, Tensor], wanted: Sequence[Tensor]
) -> dict[Tensor, Tensor]:
    """The sums of all ranks' shares, right on rank 0."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in wanted:
        by_dtype.setdefault(working_dtype(parameter), []).append(parameter)
    # on rank 0 alone: half the bytes of a sum that every rank gets
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
    roles = _mean_roles(role, loss, dtype)
    counts = (1,) + (0,) * (ranks.size - 1)
    everywhere = Everywhere(replace(roles, rank=torch.zeros_like(roles.task)), counts)
    if ranks.rank:
        _, kind = role
        nothing = TaskRows.of(_no_rows(roles), {}, {kind: {}}, shared)
        return replace(nothing, everywhere=everywhere)
    return replace(_part_of(roles, sums, role, shared), everywhere=everywhere)


def _part_of(roles: Roles, sums: Mapping[Tensor, Tensor], role: Role, shared: Shared) -> TaskRows:
    """A mean row from its gradients."""
    uses: dict[int, Use] = {}
    outside: dict[Tensor, Tensor] = {}
    inside = {parameter: j for j, parameter in enumerate(shared.parameters)}
    for parameter, g in sums.items():
        if parameter in inside:
            uses[inside[parameter]] = Dense(tuple(g.shape), g[None])
        else:
            outside[parameter] = g.to(parameter.dtype)
    _, kind = role
    return TaskRows.of(roles, uses, {kind: outside}, shared)


def _mean_roles(role: Role, loss: Tensor, dtype: torch.dtype) -> Roles:
    task, kind = role
    first = torch.zeros(1, dtype=torch.int64, device=loss.device)
    return Roles(
        task=first,
        sample=torch.full_like(first, -1),
        kind=torch.full_like(first, kind),
        loss=loss,
        tasks=(task,),
        dtype=dtype,
    )


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


def _not_finite(
    shares: Sequence[TaskRows], known: Collection[Hashable] = ()
) -> NotFiniteError | None:
    """The error of the first share that is not finite; `known` are roles of some that are not."""
    for part in shares:
        tensors = [t for use in part.uses.values() for t in use.tensors]
        tensors += [g for outside in part.outside.values() for g in outside.values()]
        if _role(part) in known or not all_finite(tensors):
            task, kind = _role(part)
            return NotFiniteError(
                f"rows: the mean gradient of {task!r} {KINDS[kind]} is not finite although its "
                "losses are; .grad is untouched. Guard it in the loss."
            )
    return None


def _no_rows(roles: Roles) -> Roles:
    return replace(
        roles,
        task=roles.task[:0],
        sample=roles.sample[:0],
        kind=roles.kind[:0],
        loss=roles.loss[:0],
        rank=None,
    )
