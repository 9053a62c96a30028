"""What the engine did with each parameter, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import recomputes
from mtu_fast._graph.plan import Plan, Site
from mtu_fast._rows.products import route
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.uses import Dense, Use


@dataclass(frozen=True)
class Note:
    """How the rows of a parameter are obtained at one site.

    Attributes:
        node: the autograd node; "" where rows come by a backward of the whole graph each.
        by_rule: whether a rule gives the rows there, and not one local vjp per row.
        through: nodes that the rows are pulled through.
        again: whether a part of the forward runs again for it (checkpointing).
        hooked: the node at which a hook is why rows come by a backward each.
    """

    node: str
    by_rule: bool
    through: tuple[str, ...] = ()
    again: bool = False
    hooked: str = ""

    @property
    def slow(self) -> bool:
        """Whether rows come one by one, or together through several nodes, instead of by a rule alone."""
        return not self.by_rule or bool(self.through)

    def __str__(self) -> str:
        if self.hooked:
            return f"one backward per row, since a hook sees the gradient at {self.hooked}"
        if not self.node:
            return "one backward per row"
        said = [f"{self.node}: {self._way()}"]
        if self.through:
            said.append(f"pulled through {', '.join(self.through)}")
        if self.again and not self.slow:
            said.append("tensors recomputed (checkpointing)")
        return ", ".join(said)

    def _way(self) -> str:
        if not self.by_rule:
            return "one local vjp per row"
        return "rows by rule" if self.through else "rule"


def notes(graph: Graph, plan: Plan) -> dict[int, list[Note]]:
    """For each parameter, how its rows are obtained at each site."""
    if plan.alone:
        return {j: [Note("", False, hooked=plan.hooked)] for j in graph.leaf.values()}
    found: dict[int, list[Note]] = {}
    for sites in plan.sites.values():
        for site in sites:
            parameters, note = _noted(graph, plan, site)
            for j in parameters:
                found.setdefault(j, []).append(note)
    return found


def _noted(graph: Graph, plan: Plan, site: Site) -> tuple[list[int], Note]:
    """The parameters below a site, and what is to be said of it."""
    name = graph.names[site.node]
    if site.way is not None and not plan.is_local(site):
        return [site.way.parameter], Note(name, True, again=recomputes(graph.nodes[site.node]))
    region = graph.region([site.edge])
    through = dict.fromkeys(graph.names[k] for k in region if k not in graph.leaf)
    # one site may be above several parameters, whose rows all come through it
    parameters = [graph.leaf[k] for k in region if k in graph.leaf]
    by_rule = (site.node, site.slot) not in plan.local
    return parameters, Note(name, by_rule, tuple(through))


@dataclass(frozen=True)
class Line:
    """One parameter: where it is used, how its rows are known, and what that holds.

    Attributes:
        name: the parameter's name in the model.
        shape: its shape.
        sites: autograd node and way at each place of use.
        kept: "rows" or "factors"; "-" where no row reaches the parameter.
        route: how its Gram is computed.
        bytes: what is held for it, over all tasks.
        slow: whether rows come one by one instead of by a rule.
    """

    name: str
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    kept: str
    route: str
    bytes: int
    slow: bool


@dataclass(frozen=True)
class Explanation:
    """A line for every parameter; printing it gives a table.

    Attributes:
        lines: of the parameters, in the engine's order.
        trials: autograd nodes that move rows as the data say, and are therefore looked at anew in
            every step.
        anew: why the plan was made anew for a step although one of the same shapes was known; "" if
            it was not.
    """

    lines: tuple[Line, ...]
    trials: tuple[str, ...] = ()
    anew: str = ""

    @staticmethod
    def of(
        notes: Mapping[int, Sequence[Note]],
        shared: Shared,
        uses: Sequence[Mapping[int, Use]],
        trials: tuple[str, ...] = (),
        anew: str = "",
    ) -> Explanation:
        """Lines from the notes on each parameter and the uses of each task."""
        lines = []
        for j, (name, p) in enumerate(zip(shared.names, shared.parameters, strict=True)):
            there = [of_task[j] for of_task in uses if j in of_task]
            lines.append(_line(name, tuple(p.shape), notes.get(j, ()), there))
        return Explanation(tuple(lines), trials, anew)

    def __str__(self) -> str:
        table = [("parameter", "shape", "kept", "route", "MiB", "uses"), *map(_cells, self.lines)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        if self.trials:
            nodes = ", ".join(_counted(self.trials))
            text.append(f"looked at in every step, since data say how rows move: {nodes}")
        if self.anew:
            text.append(f"the plan was made anew for this step: {self.anew}")
        return "\n".join(text)


def _cells(line: Line) -> tuple[str, ...]:
    shape = "×".join(map(str, line.shape)) or "scalar"
    size = f"{line.bytes / 2**20:.2f}"
    mark = "SLOW " if line.slow else ""
    return line.name, shape, line.kept, line.route, size, mark + "; ".join(_counted(line.sites))


def _line(name: str, shape: tuple[int, ...], notes: Sequence[Note], uses: Sequence[Use]) -> Line:
    sites = tuple(map(str, notes))
    if not uses:
        return Line(name, shape, sites, "-", "no row reaches it", 0, False)
    slow = any(note.slow for note in notes)
    kept = "rows" if isinstance(uses[0], Dense) else "factors"
    held = sum(use.held for use in uses)
    return Line(name, shape, sites, kept, route(uses), held, slow)


def _counted(sites: Sequence[str]) -> list[str]:
    # as `12 × AddmmBackward0: rule`, in the order of first use
    found = []
    for site, count in Counter(sites).items():
        found.append(f"{count} × {site}" if count > 1 else site)
    return found
