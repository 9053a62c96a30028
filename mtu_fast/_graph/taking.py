"""Taking rows from the graph of a batch: one per (task, sample), one mean per (task, kind), or none but their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mtu_fast._checks.flags import Flags
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import densified
from mtu_fast._graph.passes import Kept, Uses
from mtu_fast._graph.slicing import Sink, Slicer
from mtu_fast._rows.bare import no_rows
from mtu_fast._rows.batch import Batch, Labelled, roles_of
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.space import Space
from mtu_fast._rows.task_rows import Joined, TaskRows
from mtu_fast._rows.uses import Dense, Use
from mtu_fast._rows.weights import check_outside
from mtu_fast.methods import Roles

UsesOf = Callable[[Graph, Kept, Flags], Uses]
OutsideOf = Callable[[Roles], Tensor]  # weights `[R]` of the losses for the parameters outside
Counts = Mapping[tuple[str, int], int]  # (task, kind) -> samples


def sample_rows(
    batch: Batch,
    graph: Graph,
    uses_of: UsesOf,
    space: Space,
    slicer: Slicer | None = None,
    outside: OutsideOf | None = None,
) -> list[TaskRows]:
    """A row per (task, sample) that has a label.

    Args:
        batch: the losses.
        graph: theirs.
        uses_of: gives the uses of the rows of a graph.
        space: the parameters.
        slicer: cuts gradients of parameters of which this process has a slice.
        outside: weights for the parameters outside, where they are known already: one backward then
            does for all of them. None to take their gradients by task and kind.

    Returns:
        The rows of each task.

    Raises:
        RuntimeError: a parameter has a hook on its gradient, or the rows do not add up to what
            autograd gives.
    """
    _check_hooks(graph, space.shared)
    kept = batch.labels()
    roles = [batch.roles(task, of_task, graph.dtype) for task, of_task in kept.items()]
    joined = Joined.of(roles)
    # first: the pass of the rows frees the graph
    weighted: dict[Tensor, Tensor] = {}
    by_kind: dict[str, dict[int, dict[Tensor, Tensor]]] = {}
    if outside is None:
        by_kind = {task: _outside(batch, task, graph, space, slicer) for task in batch.losses}
    else:
        weighted = _weighted_outside(batch, kept, graph, space, joined.roles, outside)
    found = []
    of_tasks = uses_of(graph, list(kept.values()), batch.flags)
    for task, of_rows, uses in zip(kept, roles, of_tasks, strict=True):
        rows = TaskRows.of(of_rows, uses, by_kind.get(task, {}), space.shared, [batch.flags])
        rows.kinds = batch.kinds(task)
        found.append(rows)
    found[0].weighted, found[0].joined = weighted, joined
    return found


def mean_rows(
    batch: Batch,
    graph: Graph,
    space: Space,
    counts: Counts | None = None,
    slicer: Slicer | None = None,
    sink: Sink | None = None,
) -> list[TaskRows]:
    """The mean row of each (task, kind), by an ordinary backward each: exact on any graph.

    Args:
        batch: the losses.
        graph: theirs.
        space: the parameters.
        counts: what to divide the sums by, where the batch is a part of a larger one.
        slicer: cuts gradients of parameters of which this process has a slice.
        sink: takes gradients as they come; rows have what is left.

    Returns:
        A row each, or this batch's share of it.
    """
    found = []
    for task, loss in batch.losses.items():
        for kind, mask in batch.members[task].of.items():
            count = mask.sum() if counts is None else counts[task, kind]
            # mean row = gradient of Σ mask · loss / count
            weights = mask.to(loss.dtype) / count
            if sink is not None:
                sink.begin((task, kind))
            uses, outside = _one_row(graph, loss, weights, space, slicer, sink)
            # the value of that loss, `[1]`
            mean = (weights.double() @ loss.double())[None]
            # a mean stands for a kind of samples, and for no sample
            role = torch.full((1,), kind, device=loss.device)
            of_no_sample = torch.full_like(role, -1)
            roles = roles_of(task, of_no_sample, role, mean, graph.dtype)
            of = torch.as_tensor(count, dtype=torch.float64, device=loss.device)
            found.append(TaskRows.of(roles, uses, {kind: outside}, space.shared, [batch.flags], of))
    return found or no_rows(batch, space.shared)


def _one_row(
    graph: Graph,
    loss: Tensor,
    weights: Tensor,
    space: Space,
    slicer: Slicer | None,
    sink: Sink | None,
) -> tuple[dict[int, Use], dict[Tensor, Tensor]]:
    """The gradient of a weighted loss: uses `[1, …]` of the shared parameters, and by those outside."""
    shared = sorted(set(graph.leaf.values()))
    gradients = _gradients(graph, loss, weights, space, shared, slicer, sink)
    uses: dict[int, Use] = {}
    for j in shared:
        g = gradients.pop(space.shared.parameters[j], None)
        if g is not None:
            g = densified(g)
            # one explicit row, `[1, *shape]`
            uses[j] = Dense(tuple(g.shape), g[None])
    return uses, gradients


def weighted_gradients(
    batch: Batch,
    at: Mapping[str, Labelled],
    weights: Tensor,
    outside: Tensor,
    space: Space,
    slicer: Slicer | None = None,
    sink: Sink | None = None,
) -> dict[Tensor, Tensor]:
    """Gradients of `Σ w · loss`, by the shared parameters and by those outside.

    Args:
        batch: the losses.
        at: per task, the samples that give a row.
        weights: w `[R]` for the shared parameters.
        outside: w `[R]` for the others.
        space: the parameters.
        slicer: cuts gradients of parameters of which this process has a slice.
        sink: takes gradients as they come.

    Returns:
        {parameter: gradient} of those that are reached, and did not go into the sink.
    """
    shared, others = space.shared.parameters, list(space.outside.values())
    # one pass where all parameters take the same weights
    if weights is outside or (not batch.flags.deferred and torch.equal(weights, outside)):
        found = _weighted(batch, at, weights, [*shared, *others], False, sink)
    else:
        # else two: other weights reach parameters that are not shared
        found = _weighted(batch, at, outside, others, True, sink)
        found |= _weighted(batch, at, weights, shared, False, sink)
    return _cut(found, slicer)


def _cut(gradients: dict[Tensor, Tensor], slicer: Slicer | None) -> dict[Tensor, Tensor]:
    """This process's slices of gradients."""
    if slicer is None:
        return gradients
    return {p: slicer(g, p) for p, g in gradients.items()}


def _outside(
    batch: Batch, task: str, graph: Graph, space: Space, slicer: Slicer | None
) -> dict[int, dict[Tensor, Tensor]]:
    """kind -> gradients of the summed losses of that kind by the parameters outside."""
    loss, found = batch.losses[task], {}
    if not _reached_outside(graph, space):
        return {}
    for kind, mask in batch.sample_members[task].of.items():
        found[kind] = _gradients(graph, loss, mask.to(loss.dtype), space, (), slicer)
    return found


def _weighted_outside(
    batch: Batch,
    at: Mapping[str, Labelled],
    graph: Graph,
    space: Space,
    roles: Roles,
    outside: OutsideOf,
) -> dict[Tensor, Tensor]:
    """Gradients of `Σ w · loss` by the parameters outside, w = outside(roles)."""
    others = _reached_outside(graph, space)
    if not others:
        return {}
    w = outside(roles)
    check_outside(w, len(roles))
    return _weighted(batch, at, w.detach(), others, True, None)


def _reached_outside(graph: Graph, space: Space) -> list[Tensor]:
    return [p for p in graph.leaves if id(p) in space.outside]


def _gradients(
    graph: Graph,
    loss: Tensor,
    weights: Tensor,
    space: Space,
    shared: Sequence[int],
    slicer: Slicer | None,
    sink: Sink | None = None,
) -> dict[Tensor, Tensor]:
    """Gradients of the weighted loss by some shared parameters and by those outside that the graph reaches."""
    wanted = [*(space.shared.parameters[j] for j in shared), *_reached_outside(graph, space)]
    return _cut(_grad([loss], [weights], wanted, True, sink), slicer)


def _weighted(
    batch: Batch,
    at: Mapping[str, Labelled],
    w: Tensor,
    parameters: Sequence[Tensor],
    retain: bool,
    sink: Sink | None,
) -> dict[Tensor, Tensor]:
    losses, weights = [], []
    counts = [at[task].count(loss) for task, loss in batch.losses.items()]
    for (task, loss), piece in zip(batch.losses.items(), w.split(counts), strict=True):
        if loss.numel():
            losses.append(loss)
            weights.append(at[task].spread(piece.to(loss), loss))
    return _grad(losses, weights, [p for p in parameters if p.requires_grad], retain, sink)


def _grad(
    losses: Sequence[Tensor],
    weights: Sequence[Tensor],
    wanted: Sequence[Tensor],
    retain: bool,
    sink: Sink | None,
) -> dict[Tensor, Tensor]:
    """{parameter: gradient} of those that the losses reach."""
    if not losses or not wanted:
        return {}
    if sink is not None:
        return sink.backward(losses, weights, wanted, retain)
    grads = torch.autograd.grad(losses, wanted, weights, retain_graph=retain, allow_unused=True)
    return {p: g for p, g in zip(wanted, grads, strict=True) if g is not None}


def _check_hooks(graph: Graph, shared: Shared) -> None:
    hooked = [j for j in graph.leaf.values() if shared.parameters[j]._backward_hooks]
    if hooked:
        raise RuntimeError(
            f"rows: {shared.names[hooked[0]]} has a hook on its gradient (register_hook), which would see rows that "
            "are never built; .grad is untouched. Remove it and change .grad after backward, or what the rows make by "
            "rows.vjp; per='task' obeys it."
        )
