"""Rows and gradients of the losses of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtu_fast._checks.warned import warn
from mtu_fast._graph.autograd_errors import translated
from mtu_fast._graph.compiled import SLOW
from mtu_fast._graph.fetch import Fetcher, fetching
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import some_recompute
from mtu_fast._graph.pattern import KEPT, Pattern
from mtu_fast._graph.plans import Plans
from mtu_fast._graph.slicing import Sink, Slicer, sliced_rows
from mtu_fast._graph.statistics import used_up
from mtu_fast._graph.taking import (
    Counts,
    OutsideOf,
    mean_rows,
    sample_rows,
    weighted_gradients,
)
from mtu_fast._rows.autocast import no_autocast
from mtu_fast._rows.bare import no_rows, sample_roles
from mtu_fast._rows.batch import Batch, Labelled
from mtu_fast._rows.grad import addition, check_finite
from mtu_fast._rows.space import Space
from mtu_fast._rows.task_rows import TaskRows, join_roles
from mtu_fast._rows.update import Update
from mtu_fast.methods import Method
from mtu_fast.methods._undo import undone
from mtu_fast.methods.base import has_default_outside


class OwnTaking:
    """From the losses of this process to rows, or to gradients of their weighted sum.

    Args:
        space: the parameters.
        memory_budget: see `Engine`.
        check_names: raises an error where a graph has a node that it must not have.
        fetcher: brings back parameters that are not there as a whole.
        slicer: cuts gradients of parameters of which each process has a slice.

    Attributes:
        space: the parameters.
        plans: how rows of known graphs are taken.
        ranks: None; `JoinedTaking` has those whose rows are joined.
        size: 1, the number of processes.
    """

    ranks = None
    size = 1

    def __init__(
        self,
        space: Space,
        memory_budget: int,
        check_names: Callable[[Iterable[str]], None] | None = None,
        fetcher: Fetcher | None = None,
        slicer: Slicer | None = None,
    ) -> None:
        self.space = space
        self.plans = Plans(space.shared, memory_budget)
        self._budget = memory_budget
        self._check_names = check_names
        self._fetcher = fetcher
        self._slicer = slicer
        self._is_said = False
        self._patterns: list[Pattern] = []  # of the last graphs, the latest first

    def __getstate__(self) -> dict[str, Any]:
        # patterns hold autograd's own objects, which cannot be pickled; the next step reads its graph anew
        return {**vars(self), "_patterns": []}

    # ---- what an engine asks for -----------------------------------------------------------------

    def rows(self, batch: Callable[[], Batch], per: str) -> list[TaskRows]:
        """The rows of a batch; its graph is used up."""
        return self.take(batch(), per)

    def rows_for(self, batch: Callable[[], Batch], method: Method) -> list[TaskRows]:
        """The rows that a method is to be given; its weights for the parameters outside are known before."""
        outside = method.outside if method.needs_gram else None
        return self.take(batch(), method.per, outside=outside)

    def explicit(self, given: Callable[[], TaskRows]) -> list[TaskRows]:
        """Rows that are given as vectors."""
        return [given()]

    def weighted_backward(self, batch: Callable[[], Batch], method: Method) -> Update:
        """A method that needs no Gram: one ordinary backward of the weighted losses."""
        ours = batch()
        self.follow_all()
        at = ours.labels()
        roles = join_roles(sample_roles(ours, at))
        # if the step fails, a method that counts its steps takes this one back
        with undone(method):
            weights = method(None, roles)
            outside = weights if has_default_outside(method) else method.outside(roles)
            found = self.weighted(ours, at, weights, outside)
            check_finite(found.values(), ours.flags)
            made = addition(found, ours.flags.bad)
        # the only line that touches `.grad`: all checks are behind it
        made.write()
        # the copy of the flags to the host starts here, and is read in a later step
        ours.flags.send()
        made.run_hooks()
        return Update(weights, roles, None, flags=(ours.flags,))

    # ---- the steps -------------------------------------------------------------------------------

    def take(
        self,
        batch: Batch,
        per: str,
        counts: Counts | None = None,
        sink: Sink | None = None,
        outside: OutsideOf | None = None,
    ) -> list[TaskRows]:
        """The rows of a batch, or its share of mean rows of `counts` samples; its graph is used up."""
        if batch.is_empty:
            return no_rows(batch, self.space.shared)
        # rules compute in the dtypes that the graph recorded
        with torch.no_grad(), no_autocast(batch.device), translated():
            graph = self._graph(batch)
            if self._check_names is not None:
                self._check_names(graph.names)
            if self._slicer is not None:
                return self._slices(batch, graph, per, self._slicer)
            with fetching(self._fetcher), used_up(graph, self.space.model):
                # a checkpointed region runs its forward again, which needs whole parameters
                if self._fetcher is not None and some_recompute(graph.nodes):
                    self._fetcher.keep_all()
                if per == "task":
                    return mean_rows(batch, graph, self.space, counts, None, sink)
                self._warn_of_compiled(graph)
                return sample_rows(batch, graph, self.plans.uses, self.space, outside=outside)

    def _slices(self, batch: Batch, graph: Graph, per: str, slicer: Slicer) -> list[TaskRows]:
        """This process's slices of rows; the graph is freed with the losses."""
        if per == "task":
            return mean_rows(batch, graph, self.space, None, slicer)
        return sample_rows(batch, graph, partial(sliced_rows, slicer=slicer), self.space, slicer)

    def weighted(
        self,
        batch: Batch,
        at: Mapping[str, Labelled],
        weights: Tensor,
        outside: Tensor,
        sink: Sink | None = None,
    ) -> dict[Tensor, Tensor]:
        """The gradients of the weighted losses, but for those that go into the sink."""
        with torch.no_grad(), translated():
            found = weighted_gradients(batch, at, weights, outside, self.space, self._slicer, sink)
        reached = found.keys() if sink is None else found.keys() | sink.taken
        if not batch.is_empty and reached.isdisjoint(self.space.shared.parameters):
            self._graph(batch)  # raises if the losses reach none of them
        return found

    def follow_all(self) -> None:
        """Look at the model again where it has other trainable parameters than before."""
        self._follow(p for p in self.space.model.parameters() if p.requires_grad)

    def _follow(self, leaves: Iterable[Tensor]) -> bool:
        """Whether the model has other parameters than before; plans are then made anew."""
        moved = self.space.follow(leaves)
        if moved:
            self.plans = Plans(self.space.shared, self._budget)
        return moved

    def _graph(self, batch: Batch) -> Graph:
        """The graph of the losses, which reaches a parameter.

        Raises:
            ValueError: it does not.
        """
        losses = list(batch.losses.values())
        graph = Graph(losses, self.space.shared.parameters, self._patterns)
        # the parameters are others than at the last step: numbers of leaves are stale
        if self._follow(graph.leaves):
            graph = Graph(losses, self.space.shared.parameters)
        if not graph.leaf:
            some = ", ".join(self.space.shared.names[:3])
            raise ValueError(
                f"losses: found none of the engine's parameters ({some}, ...) in their graph, expected at least one. "
                "Are they of another model than the engine's (a copy made since?), or were the parameters frozen after "
                "the engine was made?"
            )
        # the latest first, since it is what the next step most likely has
        others = [pattern for pattern in self._patterns if pattern is not graph.pattern]
        self._patterns = [graph.pattern, *others[: KEPT - 1]]
        return graph

    def _warn_of_compiled(self, graph: Graph) -> None:
        """Say once that a compiled module is slow to take rows of."""
        if not self._is_said and graph.pattern.is_compiled:
            self._is_said = True
            warn(SLOW)
