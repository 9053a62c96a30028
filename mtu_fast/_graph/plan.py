"""Where the row gradients of each parameter are taken, and which row each gradient element belongs to.

Row numbers are laid on the losses and carried down the graph, node by node. A node is *pure* where
each element of its output gradient has one row: structure says so (`carry.py`, `moves.py`), and
where it is silent an experiment on the node does (`reach.py`). A node is *mixed* where rows meet in
it, and so is all below it: a gradient that has entered the mixed part never leaves it. Row
gradients are taken where the graph passes from its pure part to the mixed one or to a parameter, at
a *site*, and every way from a loss to a parameter has exactly one. There they come by rule, or by
one local vjp a row; what is still above mixed nodes is pulled through them, rows together
(`pull.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from mtu_fast._graph.carry import CARRY, stem
from mtu_fast._graph.graph import Edge, Graph
from mtu_fast._graph.moves import MOVES, SETTLED
from mtu_fast._graph.nodes import is_isometry
from mtu_fast._graph.reach import Reached, agree, ask
from mtu_fast._graph.rowmap import Ids, RowMap, carried, compact, first, merged

Maps = dict[int, tuple[RowMap | None, ...]]  # node -> row map of each of its outputs
Arrived = tuple[Ids | None, ...]  # the same for one node, before gaps are filled

# whose adjoint adds up what an input broadcasts, whatever the data
SUMS = frozenset(("Add", "Sub", "Rsub", "Expand"))
# what a module's full backward hooks hang on: hands everything on
PASSES = "BackwardHookFunctionBackward"


@dataclass(frozen=True)
class Site:
    """Where row gradients of a parameter are taken: the input `slot` of the pure node `node`, fed through `edge`.

    chain: the (node, output) pairs of the isometries down to parameter `parameter`; None where the
    way down is not one, and rows are pulled through the mixed region below.
    """

    node: int
    slot: int
    edge: Edge
    chain: tuple[Edge, ...] | None
    parameter: int | None


@dataclass(frozen=True)
class Trial:
    """An experiment whose outcome depends on what the node saved, and is to be repeated on another batch."""

    node: int
    maps: Arrived
    found: Reached
    count: int

    def holds(self, graph: Graph) -> bool:
        """Whether the node of another graph of the same signature moves rows in the same way."""
        return agree(ask(graph.nodes[self.node], self.maps, self.found, self.count), self.found)


@dataclass
class Plan:
    """What is known of a graph signature: its sites and, per task, the row maps of their nodes.

    Attributes:
        sites: by node.
        maps: per task, the row maps of the nodes with a site that the task reaches.
        ends: per task, the nodes with a site below which there is no other: a pass need not run
            them, only reach them.
        trials: what was found by experiments on data.
        local: sites (node, slot) that no rule took; found during the first pass.
        late: whether some site was visited after the pass; found during the first pass.
        alone: rows are taken by one ordinary backward each, and nothing else here is used.
    """

    sites: dict[int, list[Site]]
    maps: list[Maps]
    ends: list[frozenset[int]]
    trials: list[Trial]
    local: set[tuple[int, int]] = field(default_factory=set)
    late: bool = False
    alone: bool = False

    @staticmethod
    def row_by_row(graph: Graph) -> Plan:
        """A plan that knows nothing: right on any graph, at one backward a row."""
        return Plan(
            {}, [{} for _ in graph.losses], [frozenset() for _ in graph.losses], [], alone=True
        )

    def broken(self, graph: Graph) -> int | None:
        """The first node that moves rows in another way in another graph of the same signature; None if all is well."""
        return next((trial.node for trial in self.trials if not trial.holds(graph)), None)

    def expected(self, task: int) -> Counter[int]:
        """How many uses of each parameter a pass of the task will visit."""
        reached = (
            site for i in self.maps[task] for site in self.sites[i] if not self.is_local(site)
        )
        return Counter(site.parameter for site in reached if site.parameter is not None)

    def is_local(self, site: Site) -> bool:
        """Whether the site's rows come from local vjps or are pulled through a mixed region."""
        return site.chain is None or (site.node, site.slot) in self.local


def discover(graph: Graph) -> Plan:
    """Find the pure part, the sites and the row maps; no pass through the graph is run."""
    if any(meta.is_nested_tensor for of_node in graph.outputs for meta in of_node):
        # samples of a nested tensor have no dimension that could be followed
        return Plan.row_by_row(graph)
    walk = _Walk(graph)
    walk.run()
    sites = _sites(graph, walk.mixed)
    maps = [{i: m for i, m in of_task.items() if i in sites} for of_task in walk.maps]
    return Plan(sites, maps, [_ends(graph, of_task) for of_task in maps], walk.trials)


class _Walk:
    """Row numbers on their way down from the losses.

    Attributes:
        mixed: nodes where rows meet, and all nodes below them.
        maps: per task, of the pure nodes it reaches.
        trials: experiments on data, in the order in which they were made.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.mixed = _views(graph)
        self.maps: list[Maps] = [{} for _ in graph.losses]
        self.trials: list[Trial] = []
        self._counts = [len(loss) for loss in graph.losses]
        self._arrived: list[dict[Edge, Ids]] = [{} for _ in graph.losses]

    def run(self) -> None:
        """From the losses to the parameters; nodes are numbered in topological order."""
        for task, (root, loss) in enumerate(zip(self.graph.roots, self.graph.losses, strict=True)):
            self._arrive(task, (root, loss.output_nr), first(len(loss)))
        for i in range(len(self.graph.nodes)):
            if self.graph.reaches[i] and i not in self.graph.leaf:
                self._visit(i)

    def _visit(self, i: int) -> None:
        below = {
            slot: edge
            for slot, edge in enumerate(self.graph.next[i])
            if edge and self.graph.reaches[edge[0]]
        }
        if i in self.mixed:
            self.mixed.update(node for node, _ in below.values() if node not in self.graph.leaf)
            return
        known: dict[object, Reached] = {}
        for task, arrived in enumerate(self._arrived):
            maps = tuple(arrived.pop((i, k), None) for k in range(len(self.graph.outputs[i])))
            if all(ids is None for ids in maps):
                continue
            self.maps[task][i] = tuple(
                self._row_map((i, k), ids, task) for k, ids in enumerate(maps)
            )
            key = (
                tuple(None if ids is None else (ids.shape, ids.tobytes()) for ids in maps),
                self._counts[task],
            )
            if key not in known:
                known[key] = self._through(i, maps, below, self._counts[task])
            for slot, ids in known[key].items():
                self._arrive(task, below[slot], ids)

    def _arrive(self, task: int, edge: Edge, ids: Ids | None) -> None:
        if 0 in self.graph.shape(edge):
            return  # a branch without elements gives nothing to anyone
        there = self._arrived[task].get(edge)
        ids = ids if ids is None or there is None else merged(there, ids)
        if ids is None:
            self.mixed.add(edge[0])
        else:
            self._arrived[task][edge] = ids

    def _row_map(self, edge: Edge, ids: Ids | None, task: int) -> RowMap | None:
        return (
            None
            if ids is None
            else RowMap(compact(ids, fill=True), self.graph.shape(edge), self._counts[task])
        )

    def _through(self, i: int, maps: Arrived, below: Mapping[int, Edge], count: int) -> Reached:
        """The maps that a pure node hands on to its inputs; None where rows meet."""
        found: Reached = {}
        silent: list[int] = []
        for slot, edge in below.items():
            if edge[0] in self.graph.leaf or edge[0] in self.mixed:
                continue
            said = self._structure(i, maps, slot, edge)
            if said is None:
                silent.append(slot)
            else:
                found |= said
        if silent:
            settled = stem(self.graph.names[i]) in SETTLED
            seen = ask(self.graph.nodes[i], maps, silent, count)
            seen = {
                slot: ids if settled or ids is None else _settled(ids, count)
                for slot, ids in seen.items()
            }
            apart: Reached = {slot: ids for slot, ids in seen.items() if ids is not None}
            if apart and not settled:
                self.trials.append(Trial(i, maps, apart, count))
            found |= seen
        return found

    def _structure(self, i: int, maps: Arrived, slot: int, edge: Edge) -> Reached | None:
        """What structure says of one input: its map, or that rows meet; None where it is silent."""
        total: Ids | None = None
        for k, ids in enumerate(maps):
            if ids is None:
                continue
            part = self._structure_of_output((i, k), ids, slot, edge)
            if part is None:
                return None
            one = part.get(slot)
            if slot in part and one is None:
                return part
            if one is not None:
                total = one if total is None else merged(total, one)
                if total is None:
                    return {slot: None}
        return {} if total is None else {slot: total}

    def _structure_of_output(self, output: Edge, ids: Ids, slot: int, edge: Edge) -> Reached | None:
        node, out, into = (
            self.graph.nodes[output[0]],
            self.graph.shape(output),
            self.graph.shape(edge),
        )
        name = self.graph.names[output[0]]
        op = stem(name)
        if name == PASSES:
            return {slot: ids} if output[1] == slot else {}
        if op in MOVES:
            moved = MOVES[op](node, output[1], slot, out, into, ids)
            return None if moved is None else {slot: moved}
        dims = CARRY[op](node, output[1], slot, out, into) if op in CARRY else None
        if dims is None:
            return None
        for known in (ids, compact(ids, fill=True)):
            found = carried(known, dims, into)
            if found is not None:
                return {slot: found}
        return {slot: None} if op in SUMS else None


def _settled(ids: Ids, count: int) -> Ids:
    """A map that an experiment found, without gaps where they are of this batch only: all rows are there, in order."""
    filled = compact(ids, fill=True)
    return filled if filled.min(initial=0) >= 0 and len(set(filled.flat)) == count else ids


def _views(graph: Graph) -> set[int]:
    """Views of parameters: their gradients are sums over rows, even if in this batch only one row has any."""
    roots = set(graph.roots)
    found: set[int] = set()
    for i in reversed(range(len(graph.nodes))):
        onward = isometry(graph, i) if i not in roots else None
        if onward is not None and (onward[0] in graph.leaf or onward[0] in found):
            found.add(i)
    return found


def isometry(graph: Graph, i: int) -> Edge | None:
    """Where an isometry leads; None for any other node."""
    onward = [e for e in graph.next[i] if e is not None]
    if len(onward) != 1 or not is_isometry(
        graph.nodes[i], graph.names[i], graph.shape((i, 0)), graph.shape(onward[0])
    ):
        return None
    return onward[0]


def _sites(graph: Graph, mixed: set[int]) -> dict[int, list[Site]]:
    sites: dict[int, list[Site]] = {}
    for i, edges in enumerate(graph.next):
        if i in graph.leaf or not graph.reaches[i]:
            continue
        for slot, edge in enumerate(edges):
            if edge is None or not graph.reaches[edge[0]]:
                continue
            ends = edge[0] in mixed or edge[0] in graph.leaf
            if i in mixed and not ends:
                raise RuntimeError(
                    f"rows: a gradient leaves the mixed part of the graph at {graph.names[i]} and would count twice; "
                    ".grad is untouched. Please report the model; per='task' works on any graph."
                )
            if ends and i not in mixed:
                sites.setdefault(i, []).append(Site(i, slot, edge, *chain_below(graph, edge)))
    return sites


def chain_below(graph: Graph, edge: Edge) -> tuple[tuple[Edge, ...] | None, int | None]:
    """The isometries from an edge down to a parameter, or (None, None)."""
    chain: list[Edge] = []
    while edge[0] not in graph.leaf:
        onward = isometry(graph, edge[0])
        if onward is None:
            return None, None
        chain.append(edge)
        edge = onward
    return tuple(chain), graph.leaf[edge[0]]


def _ends(graph: Graph, wanted: Mapping[int, object]) -> frozenset[int]:
    """The wanted nodes below which there is no other."""
    below = [False] * len(graph.nodes)
    for i in reversed(range(len(graph.nodes))):
        below[i] = any(e is not None and (e[0] in wanted or below[e[0]]) for e in graph.next[i])
    return frozenset(i for i in wanted if not below[i])
