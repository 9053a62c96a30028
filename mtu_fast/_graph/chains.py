"""Chains of views and casts from a parameter to where it is used: maps whose adjoints keep inner products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from mtu_fast._graph.carry import signed
from mtu_fast._graph.graph import Edge, Graph
from mtu_fast._graph.nodes import integers, is_isometry
from mtu_fast._rows.uses import Chain, Outer, Stacked, Use


class Way(NamedTuple):
    """A direct way down to a parameter.

    Attributes:
        parameter: its index.
        chain: the (node, output) pairs of the isometries on it.
        turns: whether these exchange the two sides of a matrix and do no more.
    """

    parameter: int
    chain: tuple[Edge, ...] = ()
    turns: bool = False


def isometry(graph: Graph, i: int) -> Edge | None:
    """Where an isometry leads; None for any other node."""
    onward = graph.below(i)
    if len(onward) != 1:
        return None
    out, into = graph.shape((i, 0)), graph.shape(onward[0])
    if not is_isometry(graph.nodes[i], graph.names[i], out, into):
        return None
    return onward[0]


def way_below(graph: Graph, edge: Edge) -> Way | None:
    """The isometries from an edge down to a parameter; None where there is another node on the way."""
    chain: list[Edge] = []
    while edge[0] not in graph.leaf:
        onward = isometry(graph, edge[0])
        if onward is None:
            return None
        chain.append(edge)
        edge = onward
    turns = len(chain) == 1 and _transposes(graph, chain[0][0])
    return Way(graph.leaf[edge[0]], tuple(chain), turns)


def views_of_parameters(graph: Graph) -> set[int]:
    """Nodes of which the gradient is a sum over rows, even if in this batch only one row has any."""
    roots = set(graph.roots)
    found: set[int] = set()
    # from the parameters up, so that a view of a view is found
    for i in reversed(range(len(graph.nodes))):
        onward = isometry(graph, i) if i not in roots else None
        if onward is not None and (onward[0] in graph.leaf or onward[0] in found):
            found.add(i)
    return found


def through_chain(graph: Graph, chain: Sequence[Edge], use: Use) -> Use:
    """The use with the map from its space to the parameter's: views and casts, as (node, output)."""
    chain = [edge for edge in chain if not _casts(graph, edge[0])]
    if not chain:
        return use
    first, last = chain[0][0], chain[-1][0]
    # (a ⊗ b)ᵀ = b ⊗ a: the two sides of an outer product change places
    if isinstance(use, Outer) and _transposes(graph, first):
        return through_chain(graph, chain[1:], use.transposed())
    if graph.names[last] == "SelectBackward0" and graph.nodes[last]._saved_dim == 0:
        part = through_chain(graph, chain[:-1], use)
        # a block of a stack: uses of several blocks then meet without becoming rows
        if not part.chain.key:
            return _block(graph, last, part)
    # equal keys are equal maps: such uses may be added before the chain is walked
    key = tuple((graph.names[i], k, integers(graph.nodes[i])) for i, k in chain)
    return replace(use, chain=Chain(key, partial(_apply_chain, graph, chain)))


def _casts(graph: Graph, i: int) -> bool:
    """Whether a node changes a dtype alone, as autocast does: rows have the same numbers on both sides."""
    if graph.names[i] != "ToCopyBackward0":
        return False
    sides = [graph.outputs[j][k] for j, k in ((i, 0), *graph.below(i))]
    return len({side.device for side in sides}) == 1


def _transposes(graph: Graph, i: int) -> bool:
    """Whether a node exchanges the two sides of a matrix."""
    if len(graph.shape((i, 0))) != 2:
        return False
    if graph.names[i] == "PermuteBackward0":
        return [signed(d) % 2 for d in graph.nodes[i]._saved_dims] == [1, 0]
    return graph.names[i] in {"TBackward0", "TransposeBackward0"}


def _block(graph: Graph, i: int, part: Use) -> Stacked:
    """The use of a stack by a use of the block that node i selects from it."""
    (stack,) = map(graph.shape, graph.below(i))
    return Stacked(stack, (part,), (signed(graph.nodes[i]._saved_index) % stack[0],))


def _apply_chain(graph: Graph, chain: Sequence[Edge], g: Tensor) -> Tensor:
    for i, output in chain:
        ((_, _, g),) = graph.vjp(i, {output: g})
    return g
