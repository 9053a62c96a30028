"""Where the row gradients of each parameter are taken, and which row each gradient element belongs to.

A node is *pure* when each element of its output gradient belongs to one row. Row gradients are taken where the graph
leaves its pure part towards a parameter, at a *site*: by a rule if there is one, else by one local vjp a row. Where
rows mix in a node (batch statistics, a weight computed from others), the site is the pure node above it, and row
gradients are pushed down through the mixed region one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import floor, isfinite, log2

import torch
from torch.autograd.graph import GradientEdge

from mtu_fast.graph import Edge, Graph
from mtu_fast.nodes import ALONG, ISOMETRIES, SPATIAL, VIEWS, dimension, stem
from mtu_fast.rowmap import RowMap, digits, infer, uneven_weights

Maps = dict[int, tuple[RowMap | None, ...]]  # node -> row map of each of its outputs


@dataclass(frozen=True)
class Site:
    """Where row gradients of a parameter are taken: the input `slot` of the pure node `node`, fed through `edge`.

    chain: the (node, output) pairs of the isometries down to parameter `parameter`; None where the way down is not
    one, and row gradients are pushed through the mixed region below.
    """

    node: int
    slot: int
    edge: Edge
    chain: tuple[Edge, ...] | None
    parameter: int | None


@dataclass
class Plan:
    """What is known of a graph signature: its sites and, per task, the row maps of their nodes.

    Attributes:
        sites: by node.
        terminal: nodes with a site below which there is no other: a pass need not run them, only reach them.
        maps: per task, the row maps of the nodes with a site that the task reaches.
        lasting: whether the maps hold for another batch with the same signature.
        local: sites (node, slot) that no rule took; found during the first pass.
        late: whether some site was visited after the pass; found during the first pass.
    """

    sites: dict[int, list[Site]]
    terminal: frozenset[int]
    maps: list[Maps]
    lasting: bool
    local: set[tuple[int, int]] = field(default_factory=set)
    late: bool = False

    @property
    def gaps(self) -> bool:
        """Whether some map has gaps, and so may prove stale."""
        return any(m is not None and m.gaps for of in self.maps for ms in of.values() for m in ms)

    def expected(self, task: int) -> Counter[int]:
        """How many uses of each parameter a pass of the task will visit."""
        reached = (site for i in self.maps[task] for site in self.sites[i] if not self.is_local(site))
        return Counter(site.parameter for site in reached if site.parameter is not None)

    def is_local(self, site: Site) -> bool:
        """Whether the site's rows come from local vjps or are pushed through a mixed region."""
        return site.chain is None or (site.node, site.slot) in self.local


def discover(graph: Graph, limit: int, older: Plan | None = None) -> Plan:
    """Find the pure part, the sites and the row maps.

    Args:
        graph: the recorded graph; it is kept.
        limit: bytes of gradients to hold at a time, about.
        older: a plan of the same signature, whose maps fill the gaps of the new ones.
    """
    maps: list[Maps] = [{} for _ in graph.losses]
    mixed: set[int] = set()
    for chunk in _chunks(graph, limit):
        for task, of_task in enumerate(maps):
            pure, not_pure = _row_maps(graph, task, chunk)
            of_task.update(pure)
            mixed |= not_pure
    mixed |= _views(graph)
    maps = [{i: m for i, m in of_task.items() if i not in mixed} for of_task in maps]
    lasting = all(_lasts(graph, of_task) for of_task in maps)
    sites = _sites(graph, mixed)
    maps = [{i: m for i, m in of_task.items() if i in sites} for of_task in maps]
    if older is not None:
        for mine, theirs in zip(maps, older.maps, strict=True):
            mine.update({i: _filled(m, theirs[i]) for i, m in mine.items() if i in theirs})
    return Plan(sites, _terminals(graph, sites), maps, lasting)


def _chunks(graph: Graph, limit: int) -> Iterator[list[int]]:
    """The nodes above shared parameters, in portions whose gradients together take about `limit` bytes."""
    chunk: list[int] = []
    total = 0
    for i in range(len(graph.nodes)):
        if not graph.reaches[i] or i in graph.leaf:
            continue
        size = sum(m.dtype.itemsize * torch.Size(m.shape).numel() for m in graph.outputs[i])
        if chunk and total + size > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(i)
        total += size
    yield chunk


def _row_maps(graph: Graph, task: int, nodes: Sequence[int]) -> tuple[Maps, set[int]]:
    """The row maps of the nodes' outputs that the task reaches, and the nodes where its rows mix."""
    loss = graph.losses[task]
    half = any(m.dtype == torch.float16 for of_node in graph.outputs for m in of_node)
    base = 8 if half else 32  # powers up to 2**31 leave float32 and bfloat16 ample range; float16 has little
    edges = graph.edges(nodes)
    one = torch.full_like(loss, _room(graph, task, edges, base) if half else 1.0)
    plain = iter(graph.backward(task, edges, one))
    numbers = digits(len(loss), base, loss.device)
    scaled = [iter(graph.backward(task, edges, one * torch.exp2(d).to(loss.dtype))) for d in numbers]
    uneven = uneven_weights(loss)
    control = iter(graph.backward(task, edges, one * uneven))
    maps: Maps = {}
    mixed = set()
    for i in nodes:
        found: list[RowMap | None] = []
        for _ in graph.outputs[i]:
            b, others, check = next(plain), [next(s) for s in scaled], next(control)
            if b is None or check is None or b.numel() == 0:
                found.append(None)
                continue
            row_map = infer(b, [s for s in others if s is not None], base, len(loss))
            row_map = row_map if row_map is not None and row_map.agrees(b, check, uneven) else None
            found.append(row_map)
            if row_map is None:
                mixed.add(i)
        if i not in mixed and any(m is not None for m in found):
            maps[i] = tuple(found)
    return maps, mixed


def _room(graph: Graph, task: int, edges: Sequence[GradientEdge], base: int) -> float:
    """The largest power of two, at most 1, as a row weight that leaves float16 room for `2**base` times its gradients.

    Losses that a loss scaler multiplied fill its range.
    """
    for weight in (1.0, 2.0**-8, 2.0**-16):
        found = graph.backward(task, edges, torch.full_like(graph.losses[task], weight))
        half = (b for b in found if b is not None and b.numel() and b.dtype == torch.float16)
        size = max((float(b.abs().max()) for b in half), default=0.0)
        if isfinite(size):
            return weight * 2.0 ** min(0, floor(log2(2.0 ** (16 - base) / size))) if size else weight
    return 1.0  # it is not for want of room


# Products that sum over a dimension: for each input, which of its dimensions carries the output's dimension.
_PRODUCTS: dict[str, tuple[dict[int, int], ...]] = {
    "Mm": ({0: 0}, {1: 1}),
    "Addmm": ({0: 0, 1: 1}, {0: 0}, {1: 1}),
    "Mv": ({0: 0}, {}),
    "Dot": ({}, {}),
    "Bmm": ({0: 0, 1: 1}, {0: 0, 2: 2}),
    "Baddbmm": ({0: 0, 1: 1, 2: 2}, {0: 0, 1: 1}, {0: 0, 2: 2}),
}
_ATTENTION = ({0: 0, 1: 1, 2: 2}, {0: 0, 1: 1}, {0: 0, 1: 1})
_BROADCASTING = frozenset(
    ("Add", "Sub", "Rsub", "Mul", "Div", "Where", "MaskedFill", "Pow", "Expand", "Maximum", "Minimum", "Lerp",
     "Addcmul", "Addcdiv")
)  # fmt: skip


def _lasts(graph: Graph, maps: Maps) -> bool:
    """Whether the maps follow from the graph's structure, so that they hold for another batch too.

    They do where every row reaches every node, in sample-major or -minor order, and rows never meet in a sum to be
    kept apart by zeros in the data alone (packed samples and a mask, a mixing weight that happens to be zero).
    """
    for i, found in maps.items():
        if any(m is not None and not (m.regular or _picks(graph, maps, i, m)) for m in found):
            return False
    return not any(_meets(graph, maps, i, m) for i, (m, *_) in maps.items() if m is not None and m.count > 1)


def _picks(graph: Graph, maps: Maps, i: int, row_map: RowMap | None) -> bool:
    """Whether the node is a softmax of which a loss picks one class a sample, or a view of its result.

    Classes then tell the rows apart too where all labels differ. The softmax keeps its shape, so what is below it says
    which dimension is meant; a view moves no rows.
    """
    if row_map is None or not row_map.ordered:
        return False
    onward = [e for e in graph.next[i] if e is not None]
    below = [(e[0], maps[e[0]][e[1]] if e[0] in maps else None) for e in onward]
    if stem(graph.names[i]) == "LogSoftmax":
        return all(m is not None and m.regular and m.dim == row_map.dim for _, m in below)
    return graph.names[i] in ISOMETRIES and all(_picks(graph, maps, node, m) for node, m in below)


def _meets(graph: Graph, maps: Maps, i: int, row_map: RowMap) -> bool:
    """Whether the node moves its rows, or sums over them on the way to an input whose rows yet seem apart."""
    name, dim = stem(graph.names[i]), row_map.dim or 0
    if name.startswith(SPATIAL):
        return dim != 0
    moved = dimension(graph.nodes[i])
    if name in ALONG or (moved is not None and name not in VIEWS):
        ndim = max(len(graph.shape(e)) for e in (*graph.next[i], (i, 0)) if e is not None)
        return moved is None or moved % ndim == dim
    carried = _ATTENTION if name.startswith("ScaledDotProduct") else _PRODUCTS.get(name)
    for slot, edge in enumerate(graph.next[i]):
        child = maps[edge[0]][edge[1]] if edge is not None and edge[0] in maps else None
        if edge is None or child is None:
            continue
        if carried is not None and slot < len(carried):
            if carried[slot].get(dim) != child.dim:
                return True
        elif name in _BROADCASTING:
            shape = graph.shape(edge)
            at = dim - len(graph.shape((i, 0))) + len(shape)
            if at < 0 or shape[at] != len(row_map.ids):
                return True
    return False


def _views(graph: Graph) -> set[int]:
    """Views of parameters: their gradients are sums over rows, even if in this batch only one row has any."""
    roots = set(graph.roots)
    found: set[int] = set()
    for i in reversed(range(len(graph.nodes))):
        onward = [e for e in graph.next[i] if e is not None]
        view = i not in roots and graph.names[i] in ISOMETRIES and len(onward) == 1
        if view and (onward[0][0] in graph.leaf or onward[0][0] in found):
            found.add(i)
    return found


def _sites(graph: Graph, mixed: set[int]) -> dict[int, list[Site]]:
    sites: dict[int, list[Site]] = {}
    for i in range(len(graph.nodes)):
        if i in mixed or i in graph.leaf or not graph.reaches[i]:
            continue
        for slot, edge in enumerate(graph.next[i]):
            if edge is not None and graph.reaches[edge[0]] and (edge[0] in mixed or edge[0] in graph.leaf):
                sites.setdefault(i, []).append(Site(i, slot, edge, *_chain(graph, edge)))
    return sites


def _chain(graph: Graph, edge: Edge) -> tuple[tuple[Edge, ...] | None, int | None]:
    """The isometries from an edge down to a parameter, or (None, None)."""
    chain: list[Edge] = []
    while edge[0] not in graph.leaf:
        onward = [e for e in graph.next[edge[0]] if e is not None]
        if graph.names[edge[0]] not in ISOMETRIES or len(onward) != 1:
            return None, None
        chain.append(edge)
        edge = onward[0]
    return tuple(chain), graph.leaf[edge[0]]


def _terminals(graph: Graph, sites: dict[int, list[Site]]) -> frozenset[int]:
    below = [False] * len(graph.nodes)
    for i in reversed(range(len(graph.nodes))):
        below[i] = any(e is not None and (e[0] in sites or below[e[0]]) for e in graph.next[i])
    return frozenset(i for i in sites if not below[i])


def _filled(maps: tuple[RowMap | None, ...], older: tuple[RowMap | None, ...]) -> tuple[RowMap | None, ...]:
    pairs = zip(maps, older, strict=True)
    return tuple(m if m is None or o is None or not m.gaps else m.filled(o) for m, o in pairs)
