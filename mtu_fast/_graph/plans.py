"""The plans of one engine: one a graph signature, kept, and checked against an ordinary backward again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from mtu_fast._checks.flags import AT_ONCE, Flags
from mtu_fast._checks.warned import warn
from mtu_fast._graph.explain import Explanation, notes
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.hooks import Hooks
from mtu_fast._graph.passes import Kept, Passes, Uses
from mtu_fast._graph.plan import Plan, discover
from mtu_fast._graph.probe import Check, Fault, blame
from mtu_fast._graph.sweep import outlives
from mtu_fast._rows.shared import Shared

STALE = (
    "rows: the rows of a step did not add up to what autograd gives, by a plan that had held before; that step added "
    "nothing to .grad. The plan is dropped: take the step again, and one is made anew and checked at once. A hook or a "
    "function of your own that acts now and then?"
)
MOVED = (
    "rows: the data of a step moved rows in another way than those before; that step added nothing to .grad. Take it "
    "again: from now on each batch of this kind is looked at, which waits for the GPU."
)
LOOKED = 3  # steps of a graph in which the host looks at how data move rows, whatever the device
KNOWN = 64  # graph signatures remembered; each holds index vectors only

T = TypeVar("T")


@dataclass
class Schedule:
    """When checks are due: at the first time, and after 1, 2, 4, 8, … times."""

    times: int = 0

    def due(self) -> bool:
        """Whether this time is one of them; counts it."""
        now, self.times = self.times, self.times + 1
        return now & (now - 1) == 0  # 0 and the powers of two


@dataclass
class _Family:
    """Graphs of one structure, whatever their shapes.

    failed: whether a plan for one of them has ever been wrong; then all are checked.
    """

    failed: bool = False


@dataclass
class _Known:
    """The plan of a signature, what there is to say of it, its family, and the steps it has served.

    Attributes:
        moves: whether data ever moved rows in another way than before; it is then looked at each
            time.
        bad: whether its last check failed, `[]` bool on a device that runs behind the host.
        strays: whether the data of this step move rows in another way, likewise; None where the
            host looked.
    """

    plan: Plan
    explanation: Explanation
    family: _Family
    served: Schedule
    moves: bool = False
    bad: Tensor | None = None
    strays: Tensor | None = None


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
        self._flags = AT_ONCE

    def uses(self, graph: Graph, kept: Kept, flags: Flags = AT_ONCE) -> Uses:
        """The uses of each parameter by the kept rows, per task; what is left of the graph is to be released.

        Args:
            graph: of the losses.
            kept: the rows.
            flags: of the call.

        Returns:
            {parameter: use} per task.

        Raises:
            RuntimeError: the rows of the graph do not add up to what autograd gives.
        """
        self._flags = flags
        try:
            # before any plan: what is known of nodes does not hold below a hook
            hook = self._hooks.first(graph)
            uses = self._plain(graph, kept) if hook is None else self._hooked(graph, kept, hook)
            self._hooks.done()
            return uses
        finally:
            self._flags = AT_ONCE  # plans outlive the call, and are copied without it

    def _plain(self, graph: Graph, kept: Kept) -> Uses:
        """By the plan of the graph's signature."""
        key = graph.signature()
        # taken out and put back, so that the order of the table is that of last use
        uses, known = self._known_or_new(graph, kept, self._known.pop(key, None))
        self.explanation = known.explanation
        _keep(self._known, key, known)
        return uses

    def _known_or_new(self, graph: Graph, kept: Kept, known: _Known | None) -> tuple[Uses, _Known]:
        """By what is known of a graph without hooks, if it still holds."""
        if known is None:
            return self._first(graph, kept)
        node = self._moved(graph, known)
        if node is None:
            return self._again(graph, kept, known), known
        return self._anew(graph, kept, known, node), known

    def _moved(self, graph: Graph, known: _Known) -> int | None:
        """The first node that moves rows in another way than the plan has it; None if there is none, or none known."""
        known.strays = None
        if not known.plan.trials:
            return None
        # on a GPU the answer stays there, unless data are known to move rows now and then
        asks = self._flags.deferred and not known.moves
        # asked in the first steps, too: maps are then on the device when a step may be captured
        bad = known.plan.doubts(graph) if asks else None
        if bad is None or known.served.times < LOOKED:
            node = known.plan.moved(graph)
            known.moves = known.moves or node is not None
            return node
        known.strays = bad
        self._flags.refuse(bad, partial(_has_moved, known))
        return None

    def _hooked(self, graph: Graph, kept: Kept, node: int) -> Uses:
        """One backward a row, in each of which the hook sees that row alone; checked in every step."""
        name = graph.names[node]
        plan = Plan.row_by_row(graph, name)
        uses, fault = self._checked(graph, plan, kept)
        if fault is not None:
            raise self._not_linear(graph, fault, name)
        if name not in self._told:
            self._told.add(name)
            warn(
                f"rows: a hook sees the gradient at {name} (of a tensor, a module or a node), and what it makes of a "
                "row is its own, so all rows are taken by one backward each, exact and slow. A torch.autograd.Function "
                "in its place is fast; without the hook all is.",
                RuntimeWarning,
            )
        self.explanation = self._explained(graph, plan, uses)
        return uses

    def _first(self, graph: Graph, kept: Kept) -> tuple[Uses, _Known]:
        """A plan for a signature that is not known."""
        structure = graph.structure()
        family = self._families.pop(structure, None) or _Family()
        _keep(self._families, structure, family)
        # a plan is a conjecture about rules and nodes: the first time it is always checked
        plan, uses = self._sound(graph, kept, discover(graph), family, check=True)
        explanation = self._explained(graph, plan, uses)
        return uses, _Known(plan, explanation, family, Schedule(1))

    def _anew(self, graph: Graph, kept: Kept, known: _Known, node: int) -> Uses:
        """A plan in the place of one whose experiments found something else than now, first at this node."""
        plan = discover(graph, known.plan.fills)
        # whether vmap serves a node is a property of the node, not of the data
        plan.together = known.plan.together
        due = known.served.due() or known.family.failed
        known.plan, uses = self._sound(graph, kept, plan, known.family, due)
        why = f"{graph.names[node]} moved rows in another way than before"
        known.explanation = self._explained(graph, known.plan, uses, why)
        return uses

    def _again(self, graph: Graph, kept: Kept, known: _Known) -> Uses:
        """By a plan that holds, if a check that may be due does not find a fault."""
        if not known.served.due():
            self._refuse(known)
            return self._passes(graph, known.plan, kept).uses(outlives(graph, known.plan))
        if self._flags.deferred:
            return self._doubted(graph, known, kept)
        uses, fault = self._checked(graph, known.plan, kept)
        if fault is None:
            return uses
        # other shapes of the same structure are likely to fail for the same reason
        known.family.failed = True
        known.plan, uses = self._sound(graph, kept, discover(graph), known.family, check=True)
        why = "the rows of the plan before did not add up to what autograd gives"
        known.explanation = self._explained(graph, known.plan, uses, why)
        return uses

    def _doubted(self, graph: Graph, known: _Known, kept: Kept) -> Uses:
        """By a plan whose check stays on the device: where it fails, the step adds nothing and the plan is dropped."""
        check = self._check(graph, known.plan, kept)
        bad = check.doubt()
        if known.strays is not None:
            # such a step is refused for its data, which says nothing of the plan
            bad = bad & ~known.strays
        # a step may follow before the host has read the flag of the last one
        known.bad = bad if known.bad is None else known.bad | bad
        self._refuse(known)
        return check.uses()

    def _refuse(self, known: _Known) -> None:
        """A step by a plan that failed its check, of which the host need not know yet, adds nothing."""
        if known.bad is not None:
            self._flags.refuse(known.bad, partial(self._drop, known))

    def _drop(self, known: _Known) -> RuntimeError:
        known.family.failed = True
        for key in [key for key, each in self._known.items() if each is known]:
            del self._known[key]
        return RuntimeError(STALE)

    def _sound(
        self, graph: Graph, kept: Kept, plan: Plan, family: _Family, check: bool
    ) -> tuple[Plan, Uses]:
        """A new plan and its uses, if they pass the check where one is due; else one backward per row, if these do."""
        if not check and not plan.alone:
            return plan, self._passes(graph, plan, kept).uses(keep=True)
        uses, fault = self._checked(graph, plan, kept)
        if fault is None:
            return plan, uses
        # one backward per row is the definition of a row: nothing is left to fall back on
        if plan.alone:
            raise self._not_linear(graph, fault)
        family.failed = True
        self._warn(fault)
        return self._sound(graph, kept, Plan.row_by_row(graph), family, check)

    def _warn(self, fault: Fault) -> None:
        name = self._shared.names[fault.parameter]
        warn(
            f"rows: the rows of {name} do not add up to what autograd gives (error {fault.error:.1e} of "
            f"{fault.size:.1e}), so all are taken by one backward each, exact and slow. Is a rule of your "
            "own wrong, or does a hook change gradients across samples? If neither, please report the model.",
            RuntimeWarning,
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

    def _passes(self, graph: Graph, plan: Plan, kept: Kept) -> Passes:
        return Passes(graph, plan, kept, self._budget)

    def _checked(self, graph: Graph, plan: Plan, kept: Kept) -> tuple[Uses, Fault | None]:
        """The uses by a plan, and what the check finds: the first parameter whose rows do not add up."""
        check = self._check(graph, plan, kept)
        fault = check.fault()
        return ([] if fault else check.uses()), fault

    def _check(self, graph: Graph, plan: Plan, kept: Kept) -> Check:
        self._checks += 1  # other weights every time
        passes = self._passes(graph, plan, kept)
        return Check(passes, self._shared.parameters, self._checks)


def _has_moved(known: _Known) -> RuntimeError:
    known.moves = True
    return RuntimeError(MOVED)


def _keep(known: OrderedDict[Hashable, T], key: Hashable, value: T) -> None:
    """Remember as the latest; the oldest are forgotten."""
    known[key] = value
    while len(known) > KNOWN:
        known.popitem(last=False)
