"""One data-gradient pass of one task: uses of every parameter, handed over as the pass reaches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mtu_fast.graph import Edge, Graph
from mtu_fast.joint import aligned, merge
from mtu_fast.nodes import Grads, integers, recomputes
from mtu_fast.plan import Plan, Site
from mtu_fast.rowmap import RowMap
from mtu_fast.rules import RULES
from mtu_fast.uses import Chain, Dense, Outer, Use

Visit = Callable[[int, Use], None]
Seed = Callable[[int], Iterable[tuple[Edge, Tensor]]]  # row -> gradients to push down


class StaleMap(Exception):
    """A row map does not fit this pass: rows reach positions they did not reach before, or one is not finite.

    Args:
        task: which of the graph's losses.
        name: of the node with the gradient that does not fit.
        finite: whether that gradient is finite.
    """

    def __init__(self, task: int, name: str, finite: bool) -> None:
        super().__init__(task, name, finite)
        self.task, self.name, self.finite = task, name, finite


class Collector:
    """Gathers the uses of each parameter in one pass; once all are there, keeps the smaller of rows and factors.

    Or the rows, where they pay (`Use.rows_pay`) and the budget allows.

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
        # A chain cannot be walked while a pass runs, so uses behind unequal chains wait for its end.
        if len(parts) == self._expected[parameter] and aligned([part.use for part in parts]):
            self._parts[parameter] = [_Seen.now(self._cheaper(_merged(parts)))]

    def finish(self) -> dict[int, Use]:
        """One use per parameter, once the pass is over.

        Raises:
            RuntimeError: what a use is made of was written to since it was visited.
        """
        return {parameter: _merged(parts) for parameter, parts in self._parts.items()}

    def _cheaper(self, use: Use) -> Use:
        if isinstance(use, Dense):
            return use
        beyond = use.rows_bytes() - use.held
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

    Weight gradients are not computed. Sites without a rule, and those whose saved tensors are recomputed on reading
    (checkpointing), are visited after the pass.

    Args:
        graph: the recorded graph.
        plan: its plan; `local` and `late` are filled in by the first pass.
        task: which of the graph's losses.
        visit: what to do with a use.
        keep: whether the graph outlives the pass; needed on the first pass and where `outlives` says so.

    Raises:
        StaleMap: a gradient does not fit the plan's row maps.
    """
    maps = plan.maps[task]
    late: list[tuple[Site, Grads]] = []

    def reached(i: int, grads: Grads) -> None:
        for row_map, b in zip(maps[i], grads, strict=True):
            if b is not None and b.numel() and (row_map is None or not row_map.fits(b)):
                raise StaleMap(task, graph.names[i], bool(torch.isfinite(b).all()))
        wait = keep and recomputes(graph.nodes[i])
        for site in plan.sites[i]:
            use = None if wait or plan.is_local(site) else _use(graph, site, maps[i], grads)
            if use is None:
                late.append((site, grads))
            else:
                visit(*_through_chain(graph, site, use))

    _run(graph, plan, task, reached, keep)
    plan.late = plan.late or bool(late)
    seeds: list[Seed] = []
    local: dict[int, tuple[set[int], Grads]] = {}
    for site, grads in late:
        use = None if (site.node, site.slot) in plan.local else _use(graph, site, maps[site.node], grads)
        if use is None:
            plan.local.add((site.node, site.slot))
            local.setdefault(site.node, (set(), grads))[0].add(site.slot)
        elif site.chain is None:
            seeds.append(_rows_of(site, use))
        else:
            visit(*_through_chain(graph, site, use))
    seeds += [_local_vjp(graph, i, slots, maps[i], grads) for i, (slots, grads) in local.items()]
    for parameter, rows in _push_rows(graph, seeds, len(graph.losses[task])).items():
        visit(parameter, Dense(tuple(rows.shape[1:]), rows))


def outlives(graph: Graph, plan: Plan) -> bool:
    """Whether the graph must outlive the pass: for late sites, or to start again if a map proves stale."""
    return plan.late or plan.gaps or any(recomputes(graph.nodes[i]) for i in plan.sites)


def notes(graph: Graph, plan: Plan) -> dict[int, list[str]]:
    """For each parameter, how its rows are obtained at each site, in words."""
    found: dict[int, list[str]] = {}
    for i, sites in plan.sites.items():
        for site in sites:
            if not plan.is_local(site) and site.parameter is not None:
                way = "rule" + (", tensors recomputed (checkpointing)" if recomputes(graph.nodes[i]) else "")
                found.setdefault(site.parameter, []).append(f"{graph.names[i]}: {way}")
                continue
            region = graph.region(site.edge)
            through = dict.fromkeys(graph.names[k] for k in region if k not in graph.leaf)
            way = "one local vjp a row" if (i, site.slot) in plan.local else "rows by rule"
            way += f", pushed through {', '.join(through)}, where rows mix" if through else ""
            for k in region:
                if k in graph.leaf:
                    found.setdefault(graph.leaf[k], []).append(f"{graph.names[i]}: {way}")
    return found


def _run(graph: Graph, plan: Plan, task: int, reached: Callable[[int, Grads], None], keep: bool) -> None:
    """One backward pass; `reached` is called in the prehooks of running nodes, after the pass for terminal ones."""
    wanted = plan.maps[task]
    ends = [i for i in wanted if i in plan.terminal]
    running = [i for i in wanted if i not in plan.terminal]
    handles = [graph.nodes[i].register_prehook(partial(reached, i)) for i in running]
    try:
        captured = iter(graph.backward(task, graph.edges(ends), keep=keep))
    finally:
        for handle in handles:
            handle.remove()
    for i in ends:
        reached(i, tuple(next(captured) for _ in graph.outputs[i]))


def _use(graph: Graph, site: Site, maps: Sequence[RowMap | None], grads: Grads) -> Use | None:
    """What the rule of the site's node makes of its output gradient."""
    function, b = RULES.get(graph.names[site.node]), grads[0]
    if function is None or maps[0] is None or b is None or any(g is not None for g in grads[1:]):
        return None
    if b.is_complex():  # the rules are for real products; a vjp of torch's conjugates and takes real parts as it must
        return None
    return function(graph.nodes[site.node], site.slot, graph.shape(site.edge), b, maps[0])


def _through_chain(graph: Graph, site: Site, use: Use) -> tuple[int, Use]:
    """The parameter, and the use with the map from its space to the parameter's."""
    if site.chain is None or site.parameter is None:
        raise RuntimeError("a use was visited at a site without a direct way to its parameter")
    names = [graph.names[i] for i, _ in site.chain]
    if isinstance(use, Outer) and len(use.shape) == 2 and names in (["TBackward0"], ["TransposeBackward0"]):
        return site.parameter, use.transposed()
    if site.chain:
        key = tuple((graph.names[i], k, integers(graph.nodes[i])) for i, k in site.chain)
        use = replace(use, chain=Chain(key, partial(_apply_chain, graph, site.chain)))
    return site.parameter, use


def _apply_chain(graph: Graph, chain: Sequence[Edge], g: Tensor) -> Tensor:
    for i, output in chain:
        ((_, _, g),) = graph.vjp(i, {output: g})
    return g


def _local_vjp(graph: Graph, i: int, slots: set[int], maps: Sequence[RowMap | None], grads: Grads) -> Seed:
    """Row by row: the node's vjp of its output gradient with every other row masked."""

    def seed(row: int) -> list[tuple[Edge, Tensor]]:
        outputs_ = enumerate(zip(grads, maps, strict=True))
        masked = {k: m.only(b, row) for k, (b, m) in outputs_ if b is not None and m is not None}
        return [(edge, g) for slot, edge, g in graph.vjp(i, masked) if slot in slots]

    return seed


def _rows_of(site: Site, use: Use) -> Seed:
    """Row by row: what the rule gives, on its way into a mixed region."""
    rows = use.dense().rows
    return lambda row: [(site.edge, rows[row])]


def _push_rows(graph: Graph, seeds: Sequence[Seed], count: int) -> dict[int, Tensor]:
    """Push seeds down to the parameters one row at a time; rows `[N, *shape]` per parameter reached."""
    rows: dict[int, Tensor] = {}
    for row in range(count if seeds else 0):
        arrived: dict[int, dict[int, Tensor]] = {}
        for seed in seeds:
            _accumulate(arrived, seed(row))
        while arrived:
            i = min(arrived)  # topological: nothing arrives above it any more
            grads = arrived.pop(i)
            if i not in graph.leaf:
                _accumulate(arrived, [(edge, g) for _, edge, g in graph.vjp(i, grads)])
                continue
            parameter, g = graph.leaf[i], grads[0]
            if parameter not in rows:
                rows[parameter] = g.new_zeros(count, *g.shape)
            rows[parameter][row] += g
    return rows


def _accumulate(arrived: dict[int, dict[int, Tensor]], arrivals: Iterable[tuple[Edge, Tensor]]) -> None:
    for (i, output), g in arrivals:
        at = arrived.setdefault(i, {})
        at[output] = at[output] + g if output in at else g
