"""One data-gradient pass of one task: uses of every parameter, handed over as the pass reaches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import Grads, recomputes
from mtu_fast._graph.plan import Plan, Site
from mtu_fast._graph.pull import Seeds, add, local_rows, one_by_one, pulled, through_chain
from mtu_fast._graph.rowmap import RowMap
from mtu_fast._graph.rules import RULES
from mtu_fast._rows.merge import aligned, merge
from mtu_fast._rows.together import is_table
from mtu_fast._rows.uses import Dense, Gather, Use

# Nodes whose rule may decline as their index says: then local vjps serve, and need the graph.
BY_DATA = frozenset(
    f"{op}Backward0" for op in ("EmbeddingBag", "GroupedMm", "Index", "IndexPut", "IndexSelect")
)

Visit = Callable[[int, Use], None]


class Collector:
    """Gathers the uses of each parameter in one pass; once all are there, keeps the smaller of rows and factors.

    Or the rows, where they pay (`Use.rows_pay`) and the budget allows. A large table that is looked
    up and multiplied with, an embedding that is the head too, becomes rows for the budget only.

    Args:
        expected: how many uses of each parameter will come.
        rows: which rows of a use are kept, int64; None for all.
        budget: bytes that rows may take beyond factors.

    Attributes:
        budget: what is left of it.
    """

    def __init__(self, expected: Counter[int], rows: Tensor | None, budget: int) -> None:
        self.budget = budget
        self._expected = expected
        self._rows = rows
        self._parts: dict[int, list[_Seen]] = {}

    def visit(self, parameter: int, use: Use) -> None:
        """Take one use of a parameter, as `stream` hands it over."""
        parts = self._parts.setdefault(parameter, [])
        parts.append(_Seen.now(use if self._rows is None else use.select(self._rows)))
        # A chain cannot be walked while a pass runs, so uses behind unequal chains wait for its
        # end.
        if len(parts) == self._expected[parameter] and aligned([part.use for part in parts]):
            self._parts[parameter] = [_Seen.now(self._cheaper(_merged(parts)))]

    def finish(self) -> dict[int, Use]:
        """One use per parameter, once the pass is over.

        Raises:
            RuntimeError: what a use is made of was written to since it was visited.
        """
        return {parameter: _merged(parts) for parameter, parts in self._parts.items()}

    def _cheaper(self, use: Use) -> Use:
        if isinstance(use, Dense) or (isinstance(use, Gather) and use.sparse):
            return use
        # The rows of a table count as a whole: while they are formed the factors, gradients of
        # logits, are there too.
        beyond = use.rows_bytes() - (0 if is_table(use) else use.held)
        if beyond > self.budget or (beyond > 0 and not use.rows_pay()):
            return use
        self.budget -= max(beyond, 0)
        return use.dense()


class _Seen(NamedTuple):
    """A use, and the versions of what it holds when it was visited: the pass goes on and hands the same tensors on."""

    use: Use
    versions: tuple[int, ...]

    @staticmethod
    def now(use: Use) -> _Seen:
        return _Seen(use, use.versions)


def _merged(parts: Sequence[_Seen]) -> Use:
    if any(use.versions != versions for use, versions in parts):
        raise RuntimeError(
            "rows: a gradient was written to after rows had been taken from it, while the backward still ran; .grad is "
            "untouched. A tensor hook, or the backward of an autograd function, that changes the gradient it is given? "
            "Let it return a new tensor instead."
        )
    return merge([part.use for part in parts])


def stream(graph: Graph, plan: Plan, task: int, visit: Visit, keep: bool) -> None:
    """Call `visit(parameter, use)` for every site of the plan.

    Weight gradients are not computed. Sites without a rule, and those whose saved tensors are
    recomputed on reading (checkpointing), are visited after the pass.

    Args:
        graph: the recorded graph.
        plan: its plan; `local` and `late` are filled in by the first pass.
        task: which of the graph's losses.
        visit: what to do with a use.
        keep: whether the graph outlives the pass; needed on the first pass and where `outlives`
            says so.
    """
    if plan.alone:
        for parameter, row_use in one_by_one(graph, task):
            visit(parameter, row_use)
        return
    maps = plan.maps[task]
    late: dict[int, tuple[list[Site], Grads]] = {}

    def reached(i: int, grads: Grads) -> None:
        grads = tuple([None if b is None or not b.numel() else b for b in grads])
        if any(
            b is not None and row_map is None for b, row_map in zip(grads, maps[i], strict=True)
        ):
            raise RuntimeError(
                f"rows: a gradient arrives at {graph.names[i]} where the graph has no way for one; .grad is untouched. "
                "Please report the model; per='task' works on any graph."
            )
        if all(b is None for b in grads):
            return  # a branch without elements, or one that hands on nothing
        wait = keep and recomputes(graph.nodes[i])
        uses = (
            {}
            if wait
            else _uses(graph, [s for s in plan.sites[i] if not plan.is_local(s)], maps[i], grads)
        )
        for site in plan.sites[i]:
            use = uses.get(site.slot)
            if use is None:
                late.setdefault(i, ([], grads))[0].append(site)
            else:
                visit(*_arrived(graph, site, use))

    _run(graph, plan, task, reached, keep)
    plan.late = plan.late or bool(late)
    seeds: Seeds = {}
    for i, (sites, grads) in late.items():
        uses = _uses(graph, [s for s in sites if (i, s.slot) not in plan.local], maps[i], grads)
        for site in sites:
            if site.slot not in uses:
                plan.local.add((i, site.slot))
            elif site.chain is None:
                add(seeds, site.edge, uses[site.slot].dense().rows)
            else:
                visit(*_arrived(graph, site, uses[site.slot]))
        local = [site.slot for site in sites if site.slot not in uses]
        if local:
            for edge, rows in local_rows(graph, i, local, maps[i], grads, len(graph.losses[task])):
                add(seeds, edge, rows)
    for parameter, pulled_use in pulled(graph, seeds):
        visit(parameter, pulled_use)


def outlives(graph: Graph, plan: Plan) -> bool:
    """Whether the graph must outlive the pass: for sites that are visited after it."""
    if any(graph.names[i] in BY_DATA for i in plan.sites):
        return True
    return plan.alone or plan.late or any(recomputes(graph.nodes[i]) for i in plan.sites)


def notes(graph: Graph, plan: Plan) -> dict[int, list[str]]:
    """For each parameter, how its rows are obtained at each site, in words."""
    if plan.alone:
        return {j: ["one backward a row"] for j in graph.leaf.values()}
    found: dict[int, list[str]] = {}
    for i, sites in plan.sites.items():
        for site in sites:
            if not plan.is_local(site) and site.parameter is not None:
                way = "rule" + (
                    ", tensors recomputed (checkpointing)" if recomputes(graph.nodes[i]) else ""
                )
                found.setdefault(site.parameter, []).append(f"{graph.names[i]}: {way}")
                continue
            region = graph.region([site.edge])
            through = dict.fromkeys(graph.names[k] for k in region if k not in graph.leaf)
            way = "one local vjp a row" if (i, site.slot) in plan.local else "rows by rule"
            way += f", pulled through {', '.join(through)}" if through else ""
            for k in region:
                if k in graph.leaf:
                    found.setdefault(graph.leaf[k], []).append(f"{graph.names[i]}: {way}")
    return found


def _run(
    graph: Graph, plan: Plan, task: int, reached: Callable[[int, Grads], None], keep: bool
) -> None:
    """One backward pass; `reached` is called in the prehooks of running nodes, after the pass for those at its ends."""
    ends = sorted(plan.ends[task])
    running = [i for i in plan.maps[task] if i not in plan.ends[task]]
    handles = [graph.nodes[i].register_prehook(partial(reached, i)) for i in running]
    try:
        captured = iter(graph.backward(task, graph.edges(ends), keep=keep))
    finally:
        for handle in handles:
            handle.remove()
    for i in ends:
        reached(i, tuple(next(captured) for _ in graph.outputs[i]))


def _uses(
    graph: Graph, sites: Sequence[Site], maps: Sequence[RowMap | None], grads: Grads
) -> dict[int, Use]:
    """What the rule of a node makes of its output gradients, by slot, for those of its sites that it serves."""
    if not sites:
        return {}
    node = sites[0].node
    served = RULES.get(graph.names[node])
    if served is None or any(b is not None and b.is_complex() for b in grads):
        # the rules are for real products; a vjp of torch's conjugates and takes real parts as it
        # must
        return {}
    return served(
        graph.nodes[node], {site.slot: graph.shape(site.edge) for site in sites}, grads, maps
    )


def _arrived(graph: Graph, site: Site, use: Use) -> tuple[int, Use]:
    """The parameter below a site, and the use in its space."""
    if site.chain is None or site.parameter is None:
        raise RuntimeError("a use was visited at a site without a direct way to its parameter")
    return site.parameter, through_chain(graph, site.chain, use)
