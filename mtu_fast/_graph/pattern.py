"""What recorded graphs have in common where only their numbers differ: found once, and then compared node by node."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mtu_fast._graph import nodes as node_ops
from mtu_fast._graph.carry import stem
from mtu_fast._graph.compiled import is_compiled
from mtu_fast._graph.likeness import Edge, Likeness
from mtu_fast._graph.nodes import ACCUMULATE

KEPT = 4  # patterns that a graph is compared with: loaders that take turns


class Key:
    """A key that is hashed once: of a large graph that takes longer than a look-up by it."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: Hashable) -> None:
        self._parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Key) and self._hash == other._hash and self._parts == other._parts


class Pattern:
    """A graph without its nodes and numbers, so that nothing of a step is held.

    Attributes:
        names: of the nodes, such as AddmmBackward0, in topological order.
        outputs: for each node, shape, dtype and device of each output of its forward op.
        next: for each node and input, the edge to where its gradient goes, None for a constant.
        tops: the output of the graph that each loss is.
        leaf: node -> index of the shared parameter it accumulates for.
        reaches: for each node, whether a shared parameter is at or below it.
        wanted: for each node, the edges that reach a shared parameter, by the input's number.
    """

    def __init__(
        self,
        nodes: Sequence[Any],
        following: Sequence[node_ops.Following],
        tops: tuple[Edge, ...],
        which: Mapping[int, int],
    ) -> None:
        index = {node: i for i, node in enumerate(nodes)}
        self.tops = tops
        self.names = [node.name() for node in nodes]
        self.outputs = list(map(node_ops.outputs, nodes))
        self.next = [_numbered(edges, index) for edges in following]
        self._variables = _variables(self.names)
        # in this order: each of the three needs the one before
        self.leaf = self._leaf(nodes, which)
        self.reaches = self._reaching()
        self.wanted = list(map(self._wanted, self.next))
        self._integers = list(map(node_ops.integers, nodes))
        self._dimensions = list(map(node_ops.dimensions, nodes))
        self._likeness = Likeness(nodes, self.next, tops)
        stems = map(stem, self.names)
        self._foreign = list(map(node_ops.is_foreign, nodes, stems))
        self._shapes = [tuple([_shape(meta) for meta in of_node]) for of_node in self.outputs]
        self._ends: dict[frozenset[int], list[Edge]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Pattern:
        """It itself, which a copied engine may share: nothing of a step or a model is in it."""
        return self

    # ---- another graph of the same pattern -------------------------------------------------------

    def nodes_of(self, losses: Sequence[Tensor], which: Mapping[int, int]) -> list[Any] | None:
        """The nodes of the losses' graph, numbered as here; None where anything that a plan rests on differs."""
        if len(losses) != len(self.tops):
            return None
        tops = []
        for (i, output), loss in zip(self.tops, losses, strict=True):
            if loss.grad_fn is None or loss.output_nr != output:
                return None
            tops.append((i, loss.grad_fn))
        nodes = self._likeness.nodes(tops)
        # a tied or exchanged parameter changes leaves without changing a node
        return nodes if nodes is not None and self._leaf(nodes, which) == self.leaf else None

    # ---- what is known of it ---------------------------------------------------------------------

    @cached_property
    def foreign(self) -> frozenset[int]:
        """Nodes above a shared parameter whose backward is somebody's own, and thus need not be linear."""
        return frozenset(i for i, own in enumerate(self._foreign) if own and self.reaches[i])

    @cached_property
    def is_compiled(self) -> bool:
        """Whether one of the nodes is a compiled region."""
        return is_compiled(self.names)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The lowest precision that the recorded graph computes in."""
        dtypes = {meta.dtype for meta in chain.from_iterable(self.outputs)}
        floating = [dtype for dtype in dtypes if dtype.is_floating_point]
        # the largest eps is the lowest precision
        return max(floating, key=lambda dtype: torch.finfo(dtype).eps)

    @cached_property
    def signature(self) -> Hashable:
        """Structure, shapes and integer arguments as a key: what one plan serves."""
        parts = []
        for i, name in enumerate(self.names):
            if self.reaches[i] and name != ACCUMULATE:
                # without the device: a plan holds on any
                shapes = tuple([of_output[:2] for of_output in self._shapes[i]])
                parts.append((i, name, self.next[i], self._integers[i], shapes))
        return Key((self.tops, tuple(self.leaf.items()), tuple(parts)))

    def structure(self, counts: tuple[int, ...]) -> Hashable:
        """Nodes, how they are joined, their precision and dimensions, but not their sizes, as a key."""
        parts = []
        for i, name in enumerate(self.names):
            if self.reaches[i] and name != ACCUMULATE:
                kinds = tuple((len(m.shape), m.dtype) for m in self.outputs[i])
                parts.append((i, name, self.next[i], self._dimensions[i], kinds))
        return Key((self.tops, counts, tuple(self.leaf.items()), tuple(parts)))

    def below(self, i: int) -> list[Edge]:
        """The edges to where the gradients of a node's inputs go."""
        return [edge for edge in self.next[i] if edge is not None]

    def region(self, nodes: Collection[int]) -> set[int]:
        """Nodes at and below some nodes."""
        found: set[int] = set()
        stack = list(nodes)
        while stack:
            i = stack.pop()
            if i not in found:
                found.add(i)
                stack += [node for node, _ in self.below(i)]
        return found

    # ---- what is freed ---------------------------------------------------------------------------

    def ends(self, freed: frozenset[int]) -> list[Edge]:
        """Where a pass may stop that frees the graph, of which what is below these nodes is freed already."""
        if freed not in self._ends:
            done = self.region(freed)
            # a pass that frees what it walks ends at edges, and never enters what is freed already
            found = self._stops(done)
            # Below what was freed nothing runs again, not even on the way to an end of its own.
            below = {node for i, _ in found if i in done for node, _ in self.below(i)}
            spent = self.region(below)
            self._ends[freed] = [(i, k) for i, k in sorted(found) if i not in spent]
        return self._ends[freed]

    def _stops(self, done: set[int]) -> set[Edge]:
        """The edges from what is not freed to what is, or to a node that hands nothing on."""
        found: set[Edge] = set()
        for i in range(len(self.names)):
            if i in done:
                continue
            for edge in self.below(i):
                if edge[0] in done or not self.next[edge[0]]:
                    found.add(edge)
        return found

    # ---- in numbers ------------------------------------------------------------------------------

    def _leaf(self, nodes: Sequence[Any], which: Mapping[int, int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for i in self._variables:
            j = which.get(id(nodes[i].variable))
            if j is not None:
                found[i] = j
        return found

    def leaves(self, nodes: Sequence[Any]) -> list[Tensor]:
        """Every parameter in a graph of these nodes, shared or not."""
        return [nodes[i].variable for i in self._variables]

    def _reaching(self) -> list[bool]:
        found = [False] * len(self.names)
        # from the parameters up: what is below a node is numbered after it
        for i in reversed(range(len(found))):
            if i in self.leaf:
                found[i] = True
                continue
            for edge in self.next[i]:
                if edge is not None and found[edge[0]]:
                    found[i] = True
                    break
        return found

    def _wanted(self, edges: Sequence[Edge | None]) -> dict[int, Edge]:
        found: dict[int, Edge] = {}
        for slot, edge in enumerate(edges):
            if edge is not None and self.reaches[edge[0]]:
                found[slot] = edge
        return found


def _variables(names: Sequence[str]) -> list[int]:
    """The nodes that accumulate for a parameter."""
    return [i for i, name in enumerate(names) if name == ACCUMULATE]


def _shape(meta: Any) -> tuple[object, ...]:
    return tuple(meta.shape), meta.dtype, meta.device


def _numbered(edges: node_ops.Following, index: Mapping[Any, int]) -> tuple[Edge | None, ...]:
    """A node's `next_functions` with numbers in the place of nodes."""
    return tuple([None if node is None else (index[node], k) for node, k in edges])
