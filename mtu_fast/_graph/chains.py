"""Chains of views and casts from a parameter to where it is used: maps whose adjoints keep inner products."""

from __future__ import annotations

from typing import NamedTuple

from mtu_fast._graph.graph import Edge, Graph
from mtu_fast._graph.nodes import is_isometry


class Way(NamedTuple):
    """A direct way down to a parameter: its index, and the (node, output) pairs of the isometries on it."""

    parameter: int
    chain: tuple[Edge, ...] = ()


def isometry(graph: Graph, i: int) -> Edge | None:
    """Where an isometry leads; None for any other node."""
    onward = [e for e in graph.next[i] if e is not None]
    if len(onward) != 1:
        return None
    out, into = graph.shape((i, 0)), graph.shape(onward[0])
    return onward[0] if is_isometry(graph.nodes[i], graph.names[i], out, into) else None


def way_below(graph: Graph, edge: Edge) -> Way | None:
    """The isometries from an edge down to a parameter; None where there is another node on the way."""
    chain: list[Edge] = []
    while edge[0] not in graph.leaf:
        onward = isometry(graph, edge[0])
        if onward is None:
            return None
        chain.append(edge)
        edge = onward
    return Way(graph.leaf[edge[0]], tuple(chain))


def views_of_parameters(graph: Graph) -> set[int]:
    """Nodes of which the gradient is a sum over rows, even if in this batch only one row has any."""
    roots = set(graph.roots)
    found: set[int] = set()
    for i in reversed(range(len(graph.nodes))):
        onward = isometry(graph, i) if i not in roots else None
        if onward is not None and (onward[0] in graph.leaf or onward[0] in found):
            found.add(i)
    return found
