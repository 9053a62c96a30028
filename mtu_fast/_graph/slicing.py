"""Rows of a model whose parameters are cut over processes: one backward each, of which this process has its slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, Protocol

import torch
from torch import Tensor

from mtu_fast._checks.flags import Flags
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import densified
from mtu_fast._rows.batch import Labelled
from mtu_fast._rows.uses import Dense, Use

Slicer = Callable[[Any, Any], Tensor]  # (gradient, parameter) -> this process's slice


class Sink(Protocol):
    """Where gradients of a pass go as they come, so that few are whole at a time."""

    @property
    def taken(self) -> Set[Tensor]:
        """Parameters of which some went there."""
        ...

    def begin(self, kind: tuple[str, int]) -> None:
        """The passes that follow are of the mean row of a (task, kind)."""

    def backward(
        self,
        losses: Sequence[Tensor],
        weights: Sequence[Tensor],
        wanted: Sequence[Tensor],
        retain: bool,
    ) -> dict[Tensor, Tensor]:
        """One pass; the gradients that did not go there."""
        ...


def sliced_rows(
    graph: Graph, kept: Sequence[Labelled], flags: Flags, slicer: Slicer
) -> list[dict[int, Use]]:
    """Per task, this process's slices of the kept rows of each parameter.

    Graphs of tensor parallel models hold collectives, which all processes must reach equally often.
    So no experiment is made and nothing is decided here: a row is what one backward gives.

    Args:
        graph: the recorded graph; it is kept.
        kept: per task, the rows that are kept.
        flags: of the call; all is looked at at once.
        slicer: cuts a gradient.

    Returns:
        The uses.

    Raises:
        RuntimeError: rows do not add up to what one backward of all of them gives.
    """
    found = []
    for task, (loss, rows) in enumerate(zip(graph.losses, kept, strict=True)):
        # as host numbers: a loop over rows, of the same length on every process
        which = torch.arange(len(loss), device=loss.device) if rows.at is None else rows.at
        uses = _rows(graph, task, which.tolist(), slicer)
        weights = loss.new_zeros(len(loss)).index_fill(0, which, 1.0)
        _check(graph, uses, _gradients(graph, task, weights, slicer))
        found.append(uses)
    return found


def _rows(graph: Graph, task: int, which: Sequence[int], slicer: Slicer) -> dict[int, Use]:
    loss = graph.losses[task]
    by_leaf: dict[int, dict[int, Tensor]] = {}
    for r, sample in enumerate(which):
        one = loss.new_zeros(len(loss))
        one[sample] = 1.0
        for j, g in _gradients(graph, task, one, slicer).items():
            # a row need not reach every parameter; what is missing stays 0
            by_leaf.setdefault(j, {})[r] = g
    uses: dict[int, Use] = {}
    for j, of_rows in by_leaf.items():
        like = next(iter(of_rows.values()))
        rows = like.new_zeros(len(which), *like.shape)
        for r, g in of_rows.items():
            rows[r] = g
        uses[j] = Dense(tuple(like.shape), rows)
    return uses


def _gradients(graph: Graph, task: int, weights: Tensor, slicer: Slicer) -> dict[int, Tensor]:
    """By parameter index, this process's slice of the gradient of the weighted losses."""
    leaves = {j: graph.nodes[i].variable for i, j in graph.leaf.items()}
    wanted = [leaves[j] for j in sorted(leaves)]
    grads = torch.autograd.grad(
        [graph.losses[task]], wanted, [weights], retain_graph=True, allow_unused=True
    )
    found = {}
    for j, g in zip(sorted(leaves), grads, strict=True):
        if g is not None:
            found[j] = densified(slicer(g, leaves[j]))
    return found


def _check(graph: Graph, uses: dict[int, Use], truth: dict[int, Tensor]) -> None:
    """Rows add up, but for rounding, which is that of the longest parameter's rows at most.

    Raises:
        RuntimeError: they do not.
    """
    slack = min(64 * torch.finfo(graph.dtype).eps, 2.0**-5)
    sizes = {j: float(use.lengths().sum()) for j, use in uses.items()}
    floor = max(sizes.values(), default=0.0)
    for j, g in truth.items():
        error = float((uses[j].vjp(None).view_as(g) - g).norm()) if j in uses else float(g.norm())
        if error > slack * (sizes.get(j, 0.0) + floor):
            raise RuntimeError(
                f"rows: the rows of a parameter of shape {tuple(g.shape)} do not add up to what autograd gives (error "
                f"{error:.1e} of {float(g.norm()):.1e}), though each was taken by a backward of its own: gradients are "
                "not linear in the losses (a hook that clamps, random numbers?); .grad is untouched. per='task' needs "
                "no rows of samples."
            )
