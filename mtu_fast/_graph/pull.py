"""Rows through nodes that have no rule: one local vjp per row, and down through what depends on several rows at once.

Both run all rows together where torch can (`vmap`), a few at a time where memory is short, one by
one where it cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtu_fast._graph.chains import isometry, through_chain, way_below
from mtu_fast._graph.fetch import fetch
from mtu_fast._graph.graph import Edge, Graph
from mtu_fast._graph.nodes import Grads, densified, storages
from mtu_fast._graph.rowmap import RowMap
from mtu_fast._graph.rules.embedding import explicit
from mtu_fast._graph.together import Each, Found, Together, in_portions, mapped
from mtu_fast._rows.uses import Common, Dense, Use

# Rows on their way into the mixed part of a graph: at each edge the sum of what comes there, `[R,
# *shape]`.
Seeds = dict[Edge, Tensor]


def add(seeds: Seeds, edge: Edge, rows: Tensor) -> None:
    """Take in the rows `[R, *shape]` that come to an edge."""
    # not in place: the first rows may be a view of what another site holds
    seeds[edge] = seeds[edge] + rows if edge in seeds else rows


def local_rows(
    graph: Graph,
    i: int,
    slots: Iterable[int],
    maps: Sequence[RowMap | None],
    grads: Grads,
    together: Together,
) -> Iterator[tuple[Edge, Tensor]]:
    """The rows of a node's inputs, `(edge, [R, *shape])`: its vjp of each row's own part of the output gradients."""
    live: dict[int, tuple[Tensor, RowMap]] = {}
    for k, (b, row_map) in enumerate(zip(grads, maps, strict=True)):
        if b is not None and row_map is not None:  # outputs that a gradient comes to
            live[k] = b, row_map
    wanted: list[tuple[int, Edge]] = []
    for slot in slots:
        edge = graph.next[i][slot]
        if edge is not None:
            wanted.append((slot, edge))

    def one(parts: list[Tensor]) -> Found:
        of_outputs = dict(zip(live, parts, strict=True))
        found = {slot: g for slot, _, g in graph.vjp(i, of_outputs)}
        return [found.get(slot) for slot, _ in wanted]

    def several(rows: Tensor) -> Found:
        # each row sees its own part of b, and zeros elsewhere: the vjp of a sum is the sum of vjps
        parts = [row_map.only(b, rows) for b, row_map in live.values()]
        return together(i, one, mapped(one), parts)

    # bytes that one row's copy of the output gradients takes
    size = sum(b.numel() * b.element_size() for b, _ in live.values())
    b, row_map = next(iter(live.values()))
    found = in_portions(several, row_map.count, size, b.device)
    for (_, edge), rows in zip(wanted, found, strict=True):
        if rows is not None:
            yield edge, rows


def pulled(graph: Graph, seeds: Seeds, together: Together) -> Iterator[tuple[int, Use]]:
    """The rows' gradients of every parameter that the seeds reach, as (parameter, use)."""
    below: Seeds = {}
    for edge, rows in seeds.items():
        # two edges may end at one place below their views: their rows add up there
        add(below, *_under_views(graph, edge, rows, together))
    left: Seeds = {}
    for edge, rows in below.items():
        # whatever can leave as factors does; only the rest pays for a pass of all rows
        alone = _by_itself(graph, edge, rows, together)
        if alone is None:
            left[edge] = rows
        else:
            yield from alone
    for parameter, rows in _all_through(graph, left, together):
        yield parameter, _dense(rows)


def _by_itself(
    graph: Graph, edge: Edge, rows: Tensor, together: Together
) -> Iterable[tuple[int, Use]] | None:
    """The uses below one edge where its rows need not run with the others; None where they must."""
    node = edge[0]
    if node in graph.leaf:
        return [(graph.leaf[node], _dense(rows))]
    if graph.foreign and not graph.foreign.isdisjoint(graph.region([edge])):
        return None  # what is not linear must see all of a row at once
    found = _looked_up(graph, node, rows)
    if found is not None:
        return [found]
    few = rows[0].numel() < len(rows)
    # an outer product of rows and directions is for real numbers
    return _along_few(graph, edge, rows, together) if few and not rows.is_complex() else None


def _dense(rows: Tensor) -> Dense:
    """Rows `[R, *shape]` as a use."""
    return Dense(tuple(rows.shape[1:]), rows)


def _under_views(graph: Graph, edge: Edge, rows: Tensor, together: Together) -> tuple[Edge, Tensor]:
    """The rows below the views and casts that an edge leads to, since what is below may be a look-up."""
    while edge[0] not in graph.leaf:
        below = isometry(graph, edge[0])
        if below is None:
            break
        one = partial(_through_view, graph, edge)
        (found,) = together(edge, one, mapped(one), [rows])
        if found is None:
            break
        edge, rows = below, found
    return edge, rows


def _through_view(graph: Graph, edge: Edge, parts: list[Tensor]) -> Found:
    """The vjp of a view, of one row."""
    i, output = edge
    return [g for _, _, g in graph.vjp(i, {output: parts[0]})]


def _looked_up(graph: Graph, i: int, rows: Tensor) -> tuple[int, Use] | None:
    """The use of a parameter that the node looks up, alike for all rows; None for another node."""
    below = graph.below(i)
    if len(below) != 1:
        return None
    way = way_below(graph, below[0])
    if way is None:
        return None
    use = explicit(graph.nodes[i], graph.shape(below[0]), rows)
    if use is None:
        return None
    # a small table: rows are no larger than index and gradients
    small = use.rows_bytes() <= use.held and not use.sparse
    return way.parameter, through_chain(graph, way.chain, use.dense() if small else use)


def _along_few(
    graph: Graph, edge: Edge, rows: Tensor, together: Together
) -> Iterator[tuple[int, Use]]:
    """Rows that come through an edge of fewer numbers K than rows (a penalty in every loss) lie along K directions."""
    few = rows[0].numel()
    # one unit vector per number of the edge, `[K, *shape]`
    units = torch.eye(few, dtype=rows.dtype, device=rows.device)
    units = units.view(few, *rows.shape[1:])
    # A pass is linear: row r of a parameter is Σ_k rows[r, k] · (what unit k gives).
    for parameter, directions in _all_through(graph, {edge: units}, together):
        shape = tuple(directions.shape[1:])
        use = Common(shape, rows.reshape(-1, few), directions)
        yield parameter, use if use.held < use.rows_bytes() else use.dense()


def _all_through(graph: Graph, seeds: Seeds, together: Together) -> Iterator[tuple[int, Tensor]]:
    """Gradients of several rows `[R, *shape]` of every parameter that the seeds reach, by batched passes."""
    if not seeds:
        return
    together.passed = True
    region = graph.region(seeds)
    for i in region:
        fetch(graph.nodes[i], storages, keep=True)  # several passes, from within units
    leaves = [i for i in region if i in graph.leaf]
    one = _backward(graph, seeds, leaves)
    batched = _backward(graph, seeds, leaves, batched=True)

    def several(which: Tensor) -> Found:
        parts = [part[which] for part in seeds.values()]
        return together(tuple(seeds), one, batched, parts)

    first = next(iter(seeds.values()))
    # every row needs gradients of the whole region at once
    portions = in_portions(several, len(first), _size(graph, region), first.device)
    for i, found in zip(leaves, portions, strict=True):
        if found is not None:
            yield graph.leaf[i], found


def _backward(graph: Graph, seeds: Seeds, leaves: Sequence[int], batched: bool = False) -> Each:
    """The backward from the seeds' edges to some parameters, of one row or of several."""
    tops = [GradientEdge(graph.nodes[i], k) for i, k in seeds]
    dtypes = [graph.outputs[i][k].dtype for i, k in seeds]
    wanted = [graph.nodes[i].variable for i in leaves]

    def backward(parts: list[Tensor]) -> Found:
        # seeds were summed in the working precision; nodes take their own
        given = [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        found = torch.autograd.grad(
            tops, wanted, given, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return list(found)

    return backward


def _size(graph: Graph, nodes: Iterable[int]) -> int:
    """Bytes of the gradients of all outputs of some nodes."""
    total = 0
    for i in nodes:
        for meta in graph.outputs[i]:
            total += meta.dtype.itemsize * prod(meta.shape)
    return total


def one_by_one(graph: Graph, task: int, weights: Tensor) -> Iterator[tuple[int, Use]]:
    """The rows of a task, times weights `[N]`, by one ordinary backward each: what a row is by definition."""
    leaves, loss = list(graph.leaf), graph.losses[task]
    wanted = [graph.nodes[i].variable for i in leaves]
    found: list[list[Tensor]] = [[] for _ in leaves]
    # row r: the losses under weights that are w_r at sample r and 0 elsewhere
    for of_row in weights.diag():
        grads = torch.autograd.grad([loss], wanted, [of_row], retain_graph=True, allow_unused=True)
        for rows, g, p in zip(found, grads, wanted, strict=True):
            rows.append(torch.zeros_like(p) if g is None else densified(g))
    for i, rows in zip(leaves, found, strict=True):
        yield graph.leaf[i], _dense(torch.stack(rows))
