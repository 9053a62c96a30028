"""One data-gradient pass of one task: uses of every parameter, handed over as the pass reaches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from mtu_fast._graph.chains import through_chain
from mtu_fast._graph.fetch import fetch
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import Grads, recomputes, some_recompute, storages
from mtu_fast._graph.plan import Plan, Site, Wanted
from mtu_fast._graph.pull import Seeds, add, local_rows, one_by_one, pulled
from mtu_fast._graph.rules import RULES
from mtu_fast._graph.together import Together
from mtu_fast._rows.uses import Outer, Use

Visit = Callable[[int, Use], None]


def sweep(graph: Graph, plan: Plan, task: int, visit: Visit, keep: bool, weights: Tensor) -> None:
    """Call `visit(parameter, use)` for every site of the plan.

    Weight gradients are not computed. Sites without a rule, and those whose saved tensors are
    recomputed on reading (checkpointing), are visited after the pass.

    Args:
        graph: the recorded graph.
        plan: its plan; `local`, `late` and `together` are filled in by the first pass.
        task: which of the graph's losses.
        visit: what to do with a use.
        keep: whether the graph outlives the pass; needed on the first pass and where `outlives`
            says so.
        weights: what the losses are multiplied by, `[N]`.
    """
    if plan.alone:
        for parameter, row_use in one_by_one(graph, task, weights):
            visit(parameter, row_use)
    else:
        _Sweep(graph, plan, task, visit, keep, weights).run()


class _Sweep:
    """One pass, and what is left for after it: by node, its sites and output gradients."""

    def __init__(
        self, graph: Graph, plan: Plan, task: int, visit: Visit, keep: bool, weights: Tensor
    ) -> None:
        self._weights = weights
        self._graph, self._plan, self._visit, self._keep = graph, plan, visit, keep
        self._task, self._maps = task, plan.maps[task]
        self._late: dict[int, tuple[list[Site], Grads]] = {}
        self._seeds: Seeds = {}

    def run(self) -> None:
        """The pass, and what comes after it."""
        self._pass()
        plan, together = self._plan, Together(self._plan.together)
        for i, (sites, grads) in self._late.items():
            self._after(i, sites, grads, together)
        for parameter, use in pulled(self._graph, self._seeds, together):
            self._visit(parameter, use)
        # what is looked up or handed on below the pass is not freed by it
        plan.late = plan.late or bool(self._late) or together.passed

    def _pass(self) -> None:
        """`_reached` is called in the prehooks of running nodes, after the pass for those at its ends."""
        ends = self._plan.last[self._task]
        handles = []
        for i in self._plan.within[self._task]:
            hook = partial(self._reached, i)
            handles.append(self._graph.nodes[i].register_prehook(hook))
        edges = self._graph.edges(ends)
        try:
            captured = self._graph.backward(self._task, edges, self._weights, self._keep)
        finally:
            for handle in handles:
                handle.remove()
        start = 0
        for i in ends:
            stop = start + len(self._graph.outputs[i])
            self._reached(i, captured[start:stop])
            start = stop

    def _reached(self, i: int, grads: Grads) -> None:
        """Take the uses that the output gradients of a node give, or leave its sites for later."""
        there = tuple([b if b is not None and b.numel() else None for b in grads])
        if not self._is_expected(i, there):
            return  # a branch without elements, or one that hands on nothing
        uses = self._uses(i, self._now(i), there)
        for site in self._plan.sites[i]:
            if site.slot in uses:
                self._take(site, uses[site.slot])
            else:
                self._late.setdefault(i, ([], there))[0].append(site)

    def _now(self, i: int) -> Wanted:
        """The sites of a node whose uses can be taken while the pass runs."""
        if self._keep and recomputes(self._graph.nodes[i]):
            return {}
        return self._plan.wanted(self._graph, i)

    def _is_expected(self, i: int, grads: Grads) -> bool:
        """Whether a gradient arrives at all.

        Raises:
            RuntimeError: one does where none was expected.
        """
        # of each gradient that arrives, the map
        maps = [row_map for b, row_map in zip(grads, self._maps[i], strict=True) if b is not None]
        if None in maps:
            raise RuntimeError(
                f"rows: a gradient arrives at {self._graph.names[i]} where the graph has no way for one; .grad is "
                "untouched. Please report the model; per='task' works on any graph."
            )
        return bool(maps)

    def _after(self, i: int, sites: Sequence[Site], grads: Grads, together: Together) -> None:
        """The uses at a node's sites that were left, and the rows that go on from there."""
        uses = self._uses(i, self._plan.wanted(self._graph, i), grads)
        local: list[int] = []
        for site in sites:
            if site.slot in uses:
                self._take(site, uses[site.slot])
            else:
                local.append(site.slot)
        self._plan.local.update((i, slot) for slot in local)
        if local:
            found = local_rows(self._graph, i, local, self._maps[i], grads, together)
            for edge, rows in found:
                add(self._seeds, edge, rows)

    def _uses(self, i: int, wanted: Wanted, grads: Grads) -> dict[int, Use]:
        """What the rule of a node makes of its output gradients, by slot, for those of its sites that it serves."""
        if not wanted:
            return {}
        node = self._graph.nodes[i]
        fetch(node, storages)
        served = RULES.get(self._graph.names[i])
        # The rules are for real products; a vjp of torch's conjugates and takes real parts as it
        # must.
        if served is None or any(b is not None and b.is_complex() for b in grads):
            return {}
        return served(node, wanted, grads, self._maps[i])

    def _take(self, site: Site, use: Use) -> None:
        """The use in the space of its parameter, or its rows on their way into the mixed part."""
        way = site.way
        if way is None:
            add(self._seeds, site.edge, use.dense().rows)
        elif way.turns and type(use) is Outer:
            # (a ⊗ b)ᵀ = b ⊗ a
            self._visit(way.parameter, use.transposed())
        else:
            self._visit(way.parameter, through_chain(self._graph, way.chain, use))


def outlives(graph: Graph, plan: Plan) -> bool:
    """Whether the graph must outlive the pass: for sites that are visited after it."""
    if plan.alone or plan.late or plan.asks_data(graph):
        return True
    return some_recompute([graph.nodes[i] for i in plan.sites])
