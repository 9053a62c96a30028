"""The plans of one engine: one a graph signature, kept, and checked against an ordinary backward again and again."""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from mtu_fast._graph.collect import Collector
from mtu_fast._graph.explain import Explanation, notes
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.hooks import Hooks
from mtu_fast._graph.plan import Plan, discover
from mtu_fast._graph.probe import Check, Fault, Uses, blame, lengths_of
from mtu_fast._graph.sweep import outlives, sweep
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.together import is_table

KNOWN = 64  # graph signatures remembered; each holds index vectors only

Kept = Sequence[Tensor | None]  # per task, the rows that are kept, int64; None for all
T = TypeVar("T")


@dataclass
class Schedule:
    """When checks are due: at the first time, and after 1, 2, 4, 8, … times."""

    times: int = 0

    def due(self) -> bool:
        """Whether this time is one of them; counts it."""
        now, self.times = self.times, self.times + 1
        return now & (now - 1) == 0


@dataclass
class _Family:
    """Graphs of one structure, whatever their shapes.

    failed: whether a plan for one of them has ever been wrong; then all are checked.
    """

    failed: bool = False


@dataclass
class _Known:
    """The plan of a signature, what there is to say of it, its family, and the steps it has served."""

    plan: Plan
    explanation: Explanation
    family: _Family
    served: Schedule


class Plans:
    """How rows of recorded graphs are taken.

    A plan is made for every new signature, and anew where data move rows in another way than
    before. What it holds follows from the graph and its data at that step. The check against an
    ordinary backward asks whether rules, hooks and nodes are what they are taken for. It is due
    when a signature is new, and ever more rarely then, also where data move rows.

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
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        self._families: OrderedDict[Hashable, _Family] = OrderedDict()
        self._checks = 0
        self._hooks = Hooks()
        self._told: set[str] = set()  # nodes with a hook that were warned of

    def uses(self, graph: Graph, kept: Kept) -> Uses:
        """The uses of each parameter by the kept rows, per task; what is left of the graph is to be released.

        Raises:
            RuntimeError: the rows of the graph do not add up to what autograd gives.
        """
        hook = self._hooks.first(graph)
        uses = self._plain(graph, kept) if hook is None else self._hooked(graph, kept, hook)
        self._hooks.done()
        return uses

    def _plain(self, graph: Graph, kept: Kept) -> Uses:
        """By the plan of the graph's signature."""
        key = graph.signature()
        uses, known = self._known_or_new(graph, kept, self._known.pop(key, None))
        self.explanation = known.explanation
        _keep(self._known, key, known)
        return uses

    def _known_or_new(self, graph: Graph, kept: Kept, known: _Known | None) -> tuple[Uses, _Known]:
        """By what is known of a graph without hooks, if it still holds."""
        if known is None:
            return self._first(graph, kept)
        node = known.plan.moved(graph)
        if node is None:
            return self._again(graph, kept, known), known
        return self._anew(graph, kept, known, node), known

    def _hooked(self, graph: Graph, kept: Kept, node: int) -> Uses:
        """One backward a row, in each of which the hook sees that row alone; checked in every step."""
        name = graph.names[node]
        plan = Plan.row_by_row(graph, name)
        uses, fault = self._checked(graph, plan, kept)
        if fault is not None:
            raise self._not_linear(graph, fault, name)
        if name not in self._told:
            self._told.add(name)
            warnings.warn(
                f"rows: a hook sees the gradient at {name} (of a tensor, a module or a node), and what it makes of a "
                "row is its own, so all rows are taken by one backward each, exact and slow. A torch.autograd.Function "
                "in its place is fast; without the hook all is.",
                RuntimeWarning,
                stacklevel=frames_within(),
            )
        self.explanation = self._explained(graph, plan, uses)
        return uses

    def _first(self, graph: Graph, kept: Kept) -> tuple[Uses, _Known]:
        """A plan for a signature that is not known."""
        structure = graph.structure()
        family = self._families.pop(structure, None) or _Family()
        _keep(self._families, structure, family)
        plan, uses = self._sound(graph, kept, discover(graph), family, check=True)
        known = _Known(plan, self._explained(graph, plan, uses), family, Schedule(1))
        return uses, known

    def _anew(self, graph: Graph, kept: Kept, known: _Known, node: int) -> Uses:
        """A plan in the place of one whose experiments found something else than now, first at this node."""
        plan = discover(graph)
        plan.together = known.plan.together
        due = known.served.due() or known.family.failed
        known.plan, uses = self._sound(graph, kept, plan, known.family, due)
        why = f"{graph.names[node]} moved rows in another way than before"
        known.explanation = self._explained(graph, known.plan, uses, why)
        return uses

    def _again(self, graph: Graph, kept: Kept, known: _Known) -> Uses:
        """By a plan that holds, if a check that may be due does not find a fault."""
        if not known.served.due():
            return self._sweep(graph, known.plan, kept, outlives(graph, known.plan))
        uses, fault = self._checked(graph, known.plan, kept)
        if fault is None:
            return uses
        known.family.failed = True
        known.plan, uses = self._sound(graph, kept, discover(graph), known.family, check=True)
        why = "the rows of the plan before did not add up to what autograd gives"
        known.explanation = self._explained(graph, known.plan, uses, why)
        return uses

    def _sound(
        self, graph: Graph, kept: Kept, plan: Plan, family: _Family, check: bool
    ) -> tuple[Plan, Uses]:
        """A new plan and its uses, if they pass the check where one is due; else one backward per row, if these do."""
        if not check and not plan.alone:
            return plan, self._sweep(graph, plan, kept, keep=True)
        uses, fault = self._checked(graph, plan, kept)
        if fault is None:
            return plan, uses
        if plan.alone:
            raise self._not_linear(graph, fault)
        family.failed = True
        self._warn(fault)
        return self._sound(graph, kept, Plan.row_by_row(graph), family, check)

    def _warn(self, fault: Fault) -> None:
        name = self._shared.names[fault.parameter]
        warnings.warn(
            f"rows: the rows of {name} do not add up to what autograd gives (error {fault.error:.1e} of "
            f"{fault.size:.1e}), so all are taken by one backward each, exact and slow. A hook that changes "
            "gradients across samples? If there is none, please report the model.",
            RuntimeWarning,
            stacklevel=frames_within(),
        )

    def _not_linear(self, graph: Graph, fault: Fault, hooked: str = "") -> RuntimeError:
        name = self._shared.names[fault.parameter]
        shape = tuple(self._shared.parameters[fault.parameter].shape)
        hook = f"there is a hook at {hooked}, and " if hooked else ""
        return RuntimeError(
            f"rows: the rows of {name} {shape} do not add up to what autograd gives (error {fault.error:.1e} of "
            f"{fault.size:.1e}), though each was taken by a backward of its own: {hook}{blame(graph)}. .grad is "
            "untouched. Rows exist only where gradients are linear in the losses: remove the hook, or apply it to "
            ".grad after backward; per='task' needs no rows of samples."
        )

    def _explained(self, graph: Graph, plan: Plan, uses: Uses, why: str = "") -> Explanation:
        trials = tuple(graph.names[trial.node] for trial in plan.trials)
        return Explanation.of(notes(graph, plan), self._shared, uses, trials, why)

    def _sweep(self, graph: Graph, plan: Plan, kept: Kept, keep: bool, factor: float = 1.0) -> Uses:
        """One data-gradient pass a task, of its losses times a factor."""
        found, budget = [], self._budget
        for task, rows in enumerate(kept):
            collector = Collector(plan.expected(task), rows, budget)
            last = task == len(kept) - 1
            sweep(graph, plan, task, collector.visit, keep or not last, factor)
            found.append(collector.finish())
            budget = collector.budget
        return found

    def _checked(self, graph: Graph, plan: Plan, kept: Kept) -> tuple[Uses, Fault | None]:
        """The uses by a plan, and what the check finds: the first parameter whose rows do not add up."""
        uses = self._sweep(graph, plan, kept, keep=True)
        lengths = lengths_of(graph, uses, kept)
        # A large vocabulary: its uses hold the gradient of the logits, of which an ordinary backward
        # makes two more. They are let go before it, and taken again after it.
        again = any(is_table(use) for of_task in uses for use in of_task.values())
        if again:
            uses = []
        self._checks += 1  # other weights every time
        parameters = self._shared.parameters
        check = Check(graph, parameters, kept, lengths, self._checks, lenient=plan.alone)
        if again:
            uses = self._sweep(graph, plan, kept, keep=True)
        return uses, check.fault(
            uses, lambda factor: self._sweep(graph, plan, kept, keep=True, factor=factor)
        )


def _keep(known: OrderedDict[Hashable, T], key: Hashable, value: T) -> None:
    """Remember as the latest; the oldest are forgotten."""
    known[key] = value
    while len(known) > KNOWN:
        known.popitem(last=False)


def frames_within() -> int:
    """How many frames up the caller of the package is, as `warnings.warn` counts in the function that asks."""
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("mtu_fast."):
        frame, count = frame.f_back, count + 1
    return count
