"""Where the row gradients of each parameter are taken, and which row each gradient element belongs to.

Row numbers are laid on the losses and carried down the graph, node by node (`walk.py`). A node is
*pure* where each element of its output gradient has one row: structure says so (`carry.py`,
`moves.py`), and where it is silent an experiment on the node does (`reach.py`). A node is *mixed*
where rows meet in it, and so is all below it: a gradient that has entered the mixed part never
leaves it. Row gradients are taken where the graph passes from its pure part to the mixed one or to
a parameter, at a *site*, and every way from a loss to a parameter has exactly one. There they come
by rule, or by one local vjp per row; what is still above mixed nodes is pulled through them, rows
together (`pull.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mtu_fast._graph.chains import Way, way_below
from mtu_fast._graph.graph import Edge, Graph
from mtu_fast._graph.reach import Places, Probes
from mtu_fast._graph.trial import Trial
from mtu_fast._graph.walk import Maps, Walk

# Nodes whose rule may decline as their index says: then local vjps serve, and need the graph.
BY_DATA = frozenset(
    f"{op}Backward0" for op in ("EmbeddingBag", "GroupedMm", "Index", "IndexPut", "IndexSelect")
)

Wanted = Mapping[int, tuple[int, ...]]  # the shapes of some of a node's inputs, by slot


@dataclass(frozen=True)
class Site:
    """Where row gradients of a parameter are taken: the input `slot` of the pure node `node`, fed through `edge`.

    way: down to the parameter; None where it is not direct, and rows are pulled through the mixed
    region below.
    """

    node: int
    slot: int
    edge: Edge
    way: Way | None


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
        together: whether vmap gives the rows of a place where they are pulled; found there.
        alone: rows are taken by one ordinary backward each, and nothing else here is used.
        hooked: the node at which a hook is why, by name.
        fills: whether maps say more than this batch did, see `Walk`.
        places: maps of trials on their devices.
    """

    sites: dict[int, list[Site]]
    maps: list[Maps]
    ends: list[frozenset[int]]
    trials: list[Trial]
    local: set[tuple[int, int]] = field(default_factory=set)
    late: bool = False
    together: dict[object, bool] = field(default_factory=dict)
    alone: bool = False
    hooked: str = ""
    fills: bool = True
    places: Places = field(default_factory=Places)
    _counted: dict[tuple[int, int], Counter[int]] = field(default_factory=dict)
    _wanted: dict[tuple[int, int], Wanted] = field(default_factory=dict)
    _by_data: bool | None = None

    @staticmethod
    def row_by_row(graph: Graph, hooked: str = "") -> Plan:
        """A plan that knows nothing: right on any graph, at one backward per row."""
        tasks = len(graph.losses)
        maps: list[Maps] = [{} for _ in range(tasks)]
        # no sites: `sweep` sees `alone` and runs one backward a row
        return Plan({}, maps, [frozenset()] * tasks, [], alone=True, hooked=hooked)

    def moved(self, graph: Graph) -> int | None:
        """The first node that moves rows in another way in another graph of the same signature; None if all is well."""
        probes = Probes(self.places)
        for trial in self.trials:
            if trial.strays(graph, probes):
                return trial.node
        return None

    def doubts(self, graph: Graph) -> Tensor | None:
        """The same, `[]` bool on the device: nothing is waited for. None where some node must be looked at."""
        probes = Probes(self.places)
        found: list[Tensor] = []
        for trial in self.trials:
            numbers = trial.doubt(graph, probes)
            if numbers is None:
                return None
            found += numbers
        if not found:
            return torch.zeros((), dtype=torch.bool, device=graph.losses[0].device)
        # NaN counts as moved: it compares unequal to 0
        return (torch.stack([each != 0 for each in found])).any()

    def expected(self, task: int) -> Counter[int]:
        """How many uses of each parameter a pass of the task will visit."""
        # `local` only grows, so its length tells whether a count is stale
        key = task, len(self.local)
        if key not in self._counted:
            self._counted[key] = self._count(task)
        return self._counted[key]

    def wanted(self, graph: Graph, i: int) -> Wanted:
        """The inputs of a node whose rows its rule is to give."""
        key = i, len(self.local)
        if key not in self._wanted:
            asked = [site for site in self.sites[i] if (i, site.slot) not in self.local]
            self._wanted[key] = {site.slot: graph.shape(site.edge) for site in asked}
        return self._wanted[key]

    @cached_property
    def last(self) -> list[list[int]]:
        """Per task, the nodes at the ends of a pass, in order."""
        return [sorted(ends) for ends in self.ends]

    @cached_property
    def within(self) -> list[list[int]]:
        """Per task, the nodes with a site that a pass runs."""
        return [
            [i for i in of if i not in ends] for of, ends in zip(self.maps, self.ends, strict=True)
        ]

    def asks_data(self, graph: Graph) -> bool:
        """Whether a rule may decline by what its node saved."""
        if self._by_data is None:
            self._by_data = any(graph.names[i] in BY_DATA for i in self.sites)
        return self._by_data

    def _count(self, task: int) -> Counter[int]:
        found: Counter[int] = Counter()
        for i in self.maps[task]:
            for site in self.sites[i]:
                if site.way is not None and not self.is_local(site):
                    found[site.way.parameter] += 1
        return found

    def is_local(self, site: Site) -> bool:
        """Whether the site's rows come from local vjps or are pulled through a mixed region."""
        return site.way is None or (site.node, site.slot) in self.local


def discover(graph: Graph, fills: bool = True) -> Plan:
    """Find the pure part, the sites and the row maps; no pass through the graph is run.

    fills: see `Walk`; False where that is known to let rows meet.
    """
    if any(meta.is_nested_tensor for of_node in graph.outputs for meta in of_node):
        # samples of a nested tensor have no dimension that could be followed
        return Plan.row_by_row(graph)
    walk = Walk(graph, fills)
    walk.run()
    if walk.filled and walk.mixed:
        # rows may meet only where none comes in this batch: negatives of a contrastive loss, drawn anew each time
        exact = Walk(graph, fills=False)
        exact.run()
        walk = exact if len(exact.mixed) < len(walk.mixed) else walk
    sites = _sites(graph, walk.mixed)
    maps = walk.maps(sites)
    ends = [_ends(graph, of_task) for of_task in maps]
    return Plan(sites, maps, ends, walk.trials, fills=walk.fills)


def _sites(graph: Graph, mixed: set[int]) -> dict[int, list[Site]]:
    sites: dict[int, list[Site]] = {}
    for i, edges in enumerate(graph.wanted):
        for slot, edge in edges.items():
            # the border of the pure part
            ends = edge[0] in mixed or edge[0] in graph.leaf
            if i in mixed and not ends:
                raise RuntimeError(
                    f"rows: a gradient leaves the mixed part of the graph at {graph.names[i]} and would count twice; "
                    ".grad is untouched. Please report the model; per='task' works on any graph."
                )
            if ends and i not in mixed:
                sites.setdefault(i, []).append(Site(i, slot, edge, way_below(graph, edge)))
    return sites


def _ends(graph: Graph, wanted: Mapping[int, object]) -> frozenset[int]:
    """The wanted nodes below which there is no other."""
    below = [False] * len(graph.nodes)
    # from the parameters up: what is below is numbered after it
    for i in reversed(range(len(graph.nodes))):
        below[i] = any(node in wanted or below[node] for node, _ in graph.below(i))
    return frozenset(i for i in wanted if not below[i])
