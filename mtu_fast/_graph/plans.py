"""The plans of one engine: one a graph signature, kept, and checked against an ordinary backward again and again."""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast._graph.explain import Explanation
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.plan import Plan, discover
from mtu_fast._graph.probe import Fault, blame, probe, probe_weights
from mtu_fast._graph.stream import Collector, notes, outlives, stream
from mtu_fast._rows import products
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.uses import Use

KNOWN = 64  # graph signatures remembered; each holds index vectors only

Kept = Sequence[Tensor | None]  # per task, the rows that are kept, int64; None for all
Uses = list[dict[int, Use]]  # per task, the use of each parameter


@dataclass
class _Known:
    """A plan, what there is to say of it, and how many steps it has served."""

    plan: Plan
    explanation: Explanation
    steps: int = 0

    def due(self) -> bool:
        """Whether a check is due, after 1, 2, 4, 8, … steps; counts this one."""
        self.steps += 1
        return self.steps & (self.steps - 1) == 0


def _frames_within() -> int:
    """How many frames up the caller of the package is, as `warnings.warn` counts in the function that asks."""
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("mtu_fast."):
        frame, count = frame.f_back, count + 1
    return count


class Plans:
    """How rows of recorded graphs are taken.

    Args:
        shared: the parameters.
        budget: bytes that rows may take beyond factors, a call.

    Attributes:
        explanation: of the last call of `uses`; None before the first.
    """

    def __init__(self, shared: Shared, budget: int) -> None:
        self.explanation: Explanation | None = None
        self._shared = shared
        self._budget = budget
        self._known: OrderedDict[object, _Known] = OrderedDict()

    def uses(self, graph: Graph, kept: Kept) -> Uses:
        """The uses of each parameter by the kept rows, per task; what is left of the graph is to be released.

        Raises:
            RuntimeError: the rows of the graph do not add up to what autograd gives.
        """
        key = graph.signature()
        known = self._known.pop(key, None)
        if known is None:
            uses = self._found(graph, kept, key, discover(graph))
        elif (node := known.plan.broken(graph)) is not None:
            why = f"{graph.names[node]} moved rows in another way than before"
            uses = self._found(graph, kept, key, discover(graph), why)
        elif known.due():
            uses = self._stream(graph, known.plan, kept, keep=True)
            if self._fault(graph, uses, kept, known.steps) is None:
                self._keep(key, known)
            else:
                why = "the rows of the plan before did not add up to what autograd gives"
                uses = self._found(graph, kept, key, discover(graph), why)
        else:
            uses = self._stream(graph, known.plan, kept, outlives(graph, known.plan))
            self._keep(key, known)
        return uses

    def _found(self, graph: Graph, kept: Kept, key: object, plan: Plan, why: str = "") -> Uses:
        """The uses by a plan that was just made, if they pass the check; else by one backward a row, if these do."""
        uses = self._stream(graph, plan, kept, keep=True)
        fault = self._fault(graph, uses, kept, 0, lenient=plan.alone)
        if fault is not None and not plan.alone:
            name = self._shared.names[fault.parameter]
            warnings.warn(
                f"rows: the rows of {name} do not add up to what autograd gives (error {fault.error:.1e} of "
                f"{fault.size:.1e}), so all are taken by one backward each, exact and slow. A hook that changes "
                "gradients across samples? If there is none, please report the model.",
                RuntimeWarning,
                stacklevel=_frames_within(),
            )
            return self._found(graph, kept, key, Plan.row_by_row(graph), why)
        if fault is not None:
            name, shape = (
                self._shared.names[fault.parameter],
                tuple(self._shared.parameters[fault.parameter].shape),
            )
            raise RuntimeError(
                f"rows: the rows of {name} {shape} do not add up to what autograd gives (error {fault.error:.1e} of "
                f"{fault.size:.1e}), though each was taken by a backward of its own: {blame(graph)}. .grad is "
                "untouched. Rows exist only where gradients are linear in the losses: remove the hook, or apply it to "
                ".grad after backward; per='task' needs no rows of samples."
            )
        trials = tuple(graph.names[trial.node] for trial in plan.trials)
        self._keep(
            key, _Known(plan, Explanation.of(notes(graph, plan), self._shared, uses, trials, why))
        )
        return uses

    def _keep(self, key: object, known: _Known) -> None:
        self.explanation = known.explanation
        self._known[key] = known
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)

    def _stream(self, graph: Graph, plan: Plan, kept: Kept, keep: bool) -> Uses:
        """One data-gradient pass a task."""
        found, budget = [], self._budget
        for task, rows in enumerate(kept):
            collector = Collector(plan.expected(task), rows, budget)
            last = task == len(kept) - 1
            stream(graph, plan, task, collector.visit, keep or not last)
            found.append(collector.finish())
            budget = collector.budget
        return found

    def _fault(
        self, graph: Graph, uses: Uses, kept: Kept, seed: int, lenient: bool = False
    ) -> Fault | None:
        """What the check finds: the first parameter whose rows do not add up."""
        lengths = []
        for loss, of_task, rows in zip(graph.losses, uses, kept, strict=True):
            squares = loss.new_zeros(len(loss) if rows is None else len(rows), dtype=torch.float64)
            for use in of_task.values():
                squares += products.gram([use], self._shared.precision).diagonal()
            length = squares.nan_to_num(0, 0, 0).clamp(min=0).sqrt()
            if rows is not None:
                length = length.new_zeros(len(loss)).index_copy(0, rows, length)
            lengths.append(length)

        def combine(j: int, weights: Sequence[Tensor]) -> Tensor | None:
            parts = [
                use[j].vjp((w if rows is None else w[rows]).to(torch.float64))
                for use, w, rows in zip(uses, weights, kept, strict=True)
                if j in use
            ]
            return sum(parts[1:], parts[0]) if parts else None

        weights = probe_weights(graph, lengths, seed)
        for w, rows in zip(weights, kept, strict=True):
            if rows is not None:
                w.masked_fill_(torch.ones_like(w, dtype=torch.bool).index_fill(0, rows, False), 0)
        return probe(graph, self._shared.parameters, weights, combine, lenient)
