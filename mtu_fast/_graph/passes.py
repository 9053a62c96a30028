"""Data-gradient passes by a plan: the uses of every parameter, kept or handed over one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mtu_fast._graph.collect import Collector
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.plan import Plan
from mtu_fast._graph.sweep import sweep
from mtu_fast._rows.batch import Labelled
from mtu_fast._rows.uses import Use

Kept = Sequence[Labelled]  # per task, the rows that are kept
Uses = Sequence[dict[int, Use]]  # per task, the use of each parameter
Take = Callable[[int, int, Use], None]  # what to do with a task's use of a parameter


@dataclass(frozen=True)
class Passes:
    """The passes through one graph.

    graph: the recorded graph. plan: its plan. kept: the rows that are kept. budget: bytes that rows
    may take beyond factors.
    """

    graph: Graph
    plan: Plan
    kept: Kept
    budget: int

    def uses(self, keep: bool, factor: float = 1.0, take: Take | None = None) -> Uses:
        """The uses of the losses times a factor, by one pass a task.

        Args:
            keep: whether the graph outlives the last pass.
            factor: what the losses are multiplied by.
            take: what each use is handed to as soon as it is whole; none is kept then.

        Returns:
            {parameter: use} per task.

        Raises:
            RuntimeError: what a use is made of was written to since it was visited.
        """
        found, budget = [], self.budget
        for task, rows in enumerate(self.kept):
            of_task = None if take is None else partial(take, task)
            collector = Collector(self.plan.expected(task), rows.at, budget, of_task)
            last = task == len(self.kept) - 1
            weights = torch.full_like(self.graph.losses[task], factor)
            if rows.mask is not None:
                # a sample without a label has no row, and its loss may not even be finite
                weights = torch.where(rows.mask, weights, 0)
            # tasks share the graph, so that only the last pass may free it
            sweep(self.graph, self.plan, task, collector.visit, keep or not last, weights)
            found.append(collector.finish())
            budget = collector.budget
        return found
