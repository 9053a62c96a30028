"""Rows through nodes that have no rule: one local vjp a row, and down through what depends on several rows at once.

Both run all rows together where torch can (`vmap`), a few at a time where memory is short, one by
one where it cannot.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtu_fast._graph.carry import signed
from mtu_fast._graph.chains import isometry, way_below
from mtu_fast._graph.graph import Edge, Graph
from mtu_fast._graph.nodes import Grads, densified, integers
from mtu_fast._graph.rowmap import RowMap
from mtu_fast._graph.rules.embedding import explicit
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._rows.uses import Chain, Common, Dense, Outer, Stacked, Use

ROOM = 1 << 28  # bytes of gradients of several rows that are held at a time, about

Found = list[Tensor | None]
# gradients of one row -> what becomes of them, None where there is nothing
Each = Callable[[list[Tensor]], Found]

# Rows on their way into the mixed part of a graph: at each edge the sum of what comes there, `[R,
# *shape]`.
Seeds = dict[Edge, Tensor]


class Together:
    """Rows through some map, all at once by vmap where it can be relied on, else one after another.

    vmap runs some nodes (cdist) without an error, and wrongly. What it gives for several rows is
    therefore compared with what the map makes of their sum: once for every place of a plan, if two
    rows are not zero there, and else again.

    Args:
        known: what was found at each place; filled in.
    """

    def __init__(self, known: dict[object, bool]) -> None:
        self._known = known

    def __call__(self, place: object, one: Each, batched: Each, parts: list[Tensor]) -> Found:
        """Gradients of several rows, each `[K, …]`, through the map at some place of the graph."""
        if len(parts[0]) > 1 and self._known.get(place, True):
            rows = self._batched(place, one, batched, parts)
            if rows is not None:
                return rows
        found = [one([part[k] for part in parts]) for k in range(len(parts[0]))]
        return [_joined(of_rows, torch.stack) for of_rows in zip(*found, strict=True)]

    def _batched(
        self, place: object, one: Each, batched: Each, parts: list[Tensor]
    ) -> Found | None:
        """What vmap makes of the rows; None where it raises or is wrong."""
        # one by one it is either right, or raised again
        with warnings.catch_warnings(), suppress(Exception):
            warnings.simplefilter("ignore")  # vmap tells of what it does one by one itself
            rows = batched(parts)
            if place in self._known or self._adds_up(place, rows, one, parts):
                return rows
        self._known[place] = False
        return None

    def _adds_up(self, place: object, rows: Found, one: Each, parts: list[Tensor]) -> bool:
        """Whether rows are parts of what the map makes of their sum; remembered where rows said anything."""
        told = True
        for of, g in zip(rows, one([part.sum(0) for part in parts]), strict=True):
            if of is None or g is None:
                continue
            dtype = working_dtype(of)
            sizes = of.to(dtype).flatten(1).norm(dim=1)
            error = (of.sum(0, dtype=dtype) - densified(g)).norm()
            if not bool(error <= 64 * torch.finfo(of.dtype).eps * sizes.sum()):
                return False
            told = told and int((sizes > 0).sum()) > 1
        if told:
            self._known[place] = True
        return True


def add(seeds: Seeds, edge: Edge, rows: Tensor) -> None:
    """Take in the rows `[R, *shape]` that come to an edge."""
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
        if b is not None and row_map is not None:
            live[k] = b, row_map
    wanted = [(slot, edge) for slot in slots if (edge := graph.next[i][slot]) is not None]

    def one(parts: list[Tensor]) -> Found:
        found = {slot: g for slot, _, g in graph.vjp(i, dict(zip(live, parts, strict=True)))}
        return [found.get(slot) for slot, _ in wanted]

    def several(rows: Tensor) -> Found:
        parts = [row_map.only(b, rows) for b, row_map in live.values()]
        return together(i, one, _mapped(one), parts)

    size = sum(b.numel() * b.element_size() for b, _ in live.values())
    b, row_map = next(iter(live.values()))
    found = _in_portions(several, row_map.count, size, b.device)
    for (_, edge), rows in zip(wanted, found, strict=True):
        if rows is not None:
            yield edge, rows


def pulled(graph: Graph, seeds: Seeds, together: Together) -> Iterator[tuple[int, Use]]:
    """The rows' gradients of every parameter that the seeds reach, as (parameter, use)."""
    below: Seeds = {}
    for edge, rows in seeds.items():
        add(below, *_under_views(graph, edge, rows, together))
    left: Seeds = {}
    for edge, rows in below.items():
        node, few = edge[0], rows[0].numel() < len(rows) and not rows.is_complex()
        if node in graph.leaf:
            yield graph.leaf[node], Dense(tuple(rows.shape[1:]), rows)
        elif (found := _looked_up(graph, node, rows)) is not None:
            yield found
        elif few:
            yield from _along_few(graph, edge, rows, together)
        else:
            left[edge] = rows
    for parameter, rows in _all_through(graph, left, together):
        yield parameter, Dense(tuple(rows.shape[1:]), rows)


def through_chain(graph: Graph, chain: Sequence[Edge], use: Use) -> Use:
    """The use with the map from its space to the parameter's: views and casts, as (node, output)."""
    if not chain:
        return use
    last = chain[-1][0]
    if (
        len(chain) == 1
        and isinstance(use, Outer)
        and len(use.shape) == 2
        and _transposes(graph, last)
    ):
        return use.transposed()
    if graph.names[last] == "SelectBackward0" and graph.nodes[last]._saved_dim == 0:
        part = through_chain(graph, chain[:-1], use)
        # a block of a stack: uses of several blocks then meet without becoming rows
        if not part.chain.key:
            return _block(graph, last, part)
    key = tuple((graph.names[i], k, integers(graph.nodes[i])) for i, k in chain)
    return replace(use, chain=Chain(key, partial(_apply_chain, graph, chain)))


def _transposes(graph: Graph, i: int) -> bool:
    """Whether a node with a matrix as its input exchanges the two sides."""
    if graph.names[i] == "PermuteBackward0":
        return [signed(d) % 2 for d in graph.nodes[i]._saved_dims] == [1, 0]
    return graph.names[i] in {"TBackward0", "TransposeBackward0"}


def _block(graph: Graph, i: int, part: Use) -> Stacked:
    """The use of a stack by a use of the block that node i selects from it."""
    (stack,) = (graph.shape(edge) for edge in graph.next[i] if edge is not None)
    return Stacked(stack, (part,), (signed(graph.nodes[i]._saved_index) % stack[0],))


def _apply_chain(graph: Graph, chain: Sequence[Edge], g: Tensor) -> Tensor:
    for i, output in chain:
        ((_, _, g),) = graph.vjp(i, {output: g})
    return g


def _under_views(graph: Graph, edge: Edge, rows: Tensor, together: Together) -> tuple[Edge, Tensor]:
    """The rows below the views and casts that an edge leads to, since what is below may be a look-up."""
    while edge[0] not in graph.leaf and (below := isometry(graph, edge[0])) is not None:
        i, output = edge

        def one(parts: list[Tensor], i: int = i, output: int = output) -> Found:
            return [g for _, _, g in graph.vjp(i, {output: parts[0]})]

        (found,) = together(edge, one, _mapped(one), [rows])
        if found is None:
            break
        edge, rows = below, found
    return edge, rows


def _looked_up(graph: Graph, i: int, rows: Tensor) -> tuple[int, Use] | None:
    """The use of a parameter that the node looks up, alike for all rows; None for another node."""
    below = [e for e in graph.next[i] if e is not None]
    if len(below) != 1:
        return None
    way = way_below(graph, below[0])
    if way is None:
        return None
    use = explicit(graph.nodes[i], graph.shape(below[0]), rows)
    if use is None:
        return None
    small = use.rows_bytes() <= use.held and not use.sparse
    return way.parameter, through_chain(graph, way.chain, use.dense() if small else use)


def _along_few(
    graph: Graph, edge: Edge, rows: Tensor, together: Together
) -> Iterator[tuple[int, Use]]:
    """Rows that come through an edge of fewer numbers K than rows (a penalty in every loss) lie along K directions."""
    few = rows[0].numel()
    units = torch.eye(few, dtype=rows.dtype, device=rows.device).view(few, *rows.shape[1:])
    for parameter, directions in _all_through(graph, {edge: units}, together):
        shape = tuple(directions.shape[1:])
        use = Common(shape, rows.reshape(-1, few), directions)
        yield parameter, use if use.held < use.rows_bytes() else use.dense()


def _all_through(graph: Graph, seeds: Seeds, together: Together) -> Iterator[tuple[int, Tensor]]:
    """Gradients of several rows `[R, *shape]` of every parameter that the seeds reach, by batched passes."""
    if not seeds:
        return
    region = graph.region(seeds)
    leaves = [i for i in region if i in graph.leaf]
    tops = [GradientEdge(graph.nodes[i], k) for i, k in seeds]
    dtypes = [graph.outputs[i][k].dtype for i, k in seeds]
    wanted = [graph.nodes[i].variable for i in leaves]

    def backward(parts: list[Tensor], batched: bool = False) -> Found:
        given = [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        return list(
            torch.autograd.grad(
                tops, wanted, given, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        )

    def several(which: Tensor) -> Found:
        parts = [part[which] for part in seeds.values()]
        return together(tuple(seeds), backward, lambda given: backward(given, True), parts)

    first = next(iter(seeds.values()))
    size = sum(
        m.dtype.itemsize * torch.Size(m.shape).numel() for i in region for m in graph.outputs[i]
    )
    for i, found in zip(leaves, _in_portions(several, len(first), size, first.device), strict=True):
        if found is not None:
            yield graph.leaf[i], found


def one_by_one(graph: Graph, task: int) -> Iterator[tuple[int, Use]]:
    """The rows of a task by one ordinary backward each: what a row is by definition."""
    leaves, loss = list(graph.leaf), graph.losses[task]
    wanted = [graph.nodes[i].variable for i in leaves]
    found: list[list[Tensor]] = [[] for _ in leaves]
    for weights in torch.eye(len(loss), dtype=loss.dtype, device=loss.device):
        grads = torch.autograd.grad([loss], wanted, [weights], retain_graph=True, allow_unused=True)
        for rows, g, p in zip(found, grads, wanted, strict=True):
            rows.append(torch.zeros_like(p) if g is None else densified(g))
    for i, rows in zip(leaves, found, strict=True):
        stacked = torch.stack(rows)
        yield graph.leaf[i], Dense(tuple(stacked.shape[1:]), stacked)


def _in_portions(
    several: Callable[[Tensor], Found], count: int, size: int, device: torch.device
) -> Found:
    """Row numbers in portions that take about `ROOM` bytes, each row taking `size`; what they give joined."""
    step = max(1, min(count, ROOM // max(size, 1)))
    portions = [
        several(torch.arange(k, min(k + step, count), device=device)) for k in range(0, count, step)
    ]
    return [_joined(parts, torch.cat) for parts in zip(*portions, strict=True)]


def _joined(
    parts: Sequence[Tensor | None], join: Callable[[list[Tensor]], Tensor]
) -> Tensor | None:
    there = [densified(part) for part in parts if part is not None]
    # what a node hands on follows from the node, not from the row
    return join(there) if there else None


def _mapped(one: Each) -> Each:
    """`one` under vmap, which knows no None."""

    def batched(parts: list[Tensor]) -> Found:
        absent: list[bool] = []

        def present(given: list[Tensor]) -> list[Tensor]:
            found = one(given)
            absent[:] = [g is None for g in found]
            return [g for g in found if g is not None]

        found = iter(torch.vmap(present)(parts))
        return [None if missing else next(found) for missing in absent]

    return batched
