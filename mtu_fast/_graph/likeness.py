"""Whether a graph is like one of before: its nodes are numbered in the same order, and asked all at once.

A question is put to all nodes by one call and the answers are compared as lists, so that little of it
is Python: of a large graph a loop over its nodes takes longer than a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from mtu_fast._graph import nodes as node_ops

Edge = tuple[int, int]  # (node, which of its outputs)
Getter = Callable[[Any], Any]
FOLLOWING = attrgetter("next_functions")
ASKED = tuple(map(attrgetter, ("shape", "dtype", "device")))  # of an output


class Likeness:
    """What nodes of another graph must have in common with these.

    Args:
        nodes: in topological order.
        next: for each node and input, the edge to where its gradient goes, None for a constant.
        tops: the output of the graph that each loss is.
    """

    def __init__(
        self, nodes: Sequence[Any], next: Sequence[Sequence[Edge | None]], tops: Sequence[Edge]
    ) -> None:
        self._count = len(nodes)
        self._met_first = _met_first(next, {i for i, _ in tops})
        self._inputs = list(map(len, next))
        # a constant is the node behind the last one
        edges = [(self._count, 0) if edge is None else edge for edge in chain.from_iterable(next)]
        self._children, self._outputs = ([edge[k] for edge in edges] for k in (0, 1))
        self._kinds = list(map(type, nodes))
        # of most, the type says the name
        self._named = [i for i, node in enumerate(nodes) if not _is_named(node)]
        self._names = [nodes[i].name() for i in self._named]
        self._look_at_outputs(nodes)
        self._exact: list[tuple[int, Getter]] = []  # arguments that must be the same
        self._free: list[tuple[int, Getter]] = []  # those that are to be no whole numbers again
        self._look_at_arguments(nodes)

    def _look_at_outputs(self, nodes: Sequence[Any]) -> None:
        outputs = list(map(node_ops.outputs, nodes))
        self._counts = list(map(len, outputs))
        metas = list(chain.from_iterable(outputs))
        # sizes within a nested tensor are data, of which a shape says nothing
        self._is_nested = any(meta.is_nested_tensor for meta in metas)
        self._said = [] if self._is_nested else [list(map(ask, metas)) for ask in ASKED]

    def _look_at_arguments(self, nodes: Sequence[Any]) -> None:
        for i, node in enumerate(nodes):
            for name in node_ops.arguments(node):
                value = getattr(node, name)
                exact = isinstance(value, tuple) or type(value) in node_ops.WHOLE
                (self._exact if exact else self._free).append((i, attrgetter(name)))
        self._values = _answers(nodes, self._exact)
        self._types = list(map(type, self._values + _answers(nodes, self._free)))

    def nodes(self, tops: Sequence[tuple[int, Any]]) -> list[Any] | None:
        """The nodes of a graph, numbered as here; None where anything differs.

        Args:
            tops: (number, node) of each of its losses.
        """
        nodes: list[Any] = [None] * self._count
        for i, node in tops:
            nodes[i] = node
        if self._is_nested or any(nodes[i] is not node for i, node in tops):
            return None
        try:
            for i, slot, j in self._met_first:
                nodes[j] = nodes[i].next_functions[slot][0]
            following = list(map(FOLLOWING, nodes))
        except (AttributeError, IndexError):  # no node, or one with fewer inputs
            return None
        if not self._are_joined(nodes, following):
            return None
        return nodes if self._are_alike(nodes) else None

    def _are_joined(self, nodes: list[Any], following: list[node_ops.Following]) -> bool:
        """Whether nodes hand gradients on along the same edges, and are as many."""
        if list(map(len, following)) != self._inputs:
            return False
        edges = list(chain.from_iterable(following))
        if list(map(itemgetter(1), edges)) != self._outputs:
            return False
        # nodes compare by identity
        expected = map([*nodes, None].__getitem__, self._children)
        return list(map(itemgetter(0), edges)) == list(expected) and len(set(nodes)) == len(nodes)

    def _are_alike(self, nodes: list[Any]) -> bool:
        """Whether nodes are of the same kinds, with the same arguments and shapes."""
        if list(map(type, nodes)) != self._kinds:
            return False
        if [nodes[i].name() for i in self._named] != self._names:
            return False
        outputs = list(map(node_ops.outputs, nodes))
        if list(map(len, outputs)) != self._counts:
            return False
        metas = list(chain.from_iterable(outputs))
        if [list(map(ask, metas)) for ask in ASKED] != self._said:
            return False
        values = _answers(nodes, self._exact)
        types = list(map(type, values + _answers(nodes, self._free)))
        return values == self._values and types == self._types


def _met_first(next: Sequence[Sequence[Edge | None]], tops: set[int]) -> list[tuple[int, int, int]]:
    """(node, input, node that it leads to), where this is no loss and none before led there."""
    seen, found = set(tops), []
    for i, edges in enumerate(next):
        for slot, edge in enumerate(edges):
            if edge is not None and edge[0] not in seen:
                seen.add(edge[0])
                found.append((i, slot, edge[0]))
    return found


def _is_named(node: Any) -> bool:
    """Whether the type of a node says its name: it is not one type for all that have none of their own."""
    name: str = node.name()
    return name.rpartition("::")[2] == type(node).__name__


def _answers(nodes: Sequence[Any], asked: Sequence[tuple[int, Getter]]) -> list[Any]:
    return [get(nodes[i]) for i, get in asked]
