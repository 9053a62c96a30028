"""The recorded autograd graph of the losses: its nodes by number, losses first, and passes through it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtu_fast._graph import nodes as node_ops
from mtu_fast._graph.carry import stem
from mtu_fast._graph.nodes import ACCUMULATE, Grads

Edge = tuple[int, int]  # (node, which of its outputs)


class Graph:
    """The graph below the losses of one forward.

    Attributes:
        losses: unreduced losses `[N]`, one a task.
        nodes: autograd nodes in topological order.
        names: of the nodes, such as AddmmBackward0.
        outputs: for each node, shape, dtype and device of each output of its forward op.
        roots: the node of each loss.
        next: for each node and input, the edge to where its gradient goes, None for a constant.
        wanted: for each node, those of them that reach a shared parameter, by the input's number.
        leaf: node -> index of the shared parameter it accumulates for.
        leaves: every parameter in the graph, shared or not.
        reaches: for each node, whether a shared parameter is at or below it.
    """

    def __init__(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.losses = losses
        self._freed: set[int] = set()  # tasks whose pass did not keep the graph
        following = node_ops.below([loss.grad_fn for loss in losses])
        index = {node: i for i, node in enumerate(following)}
        self.nodes: list[Any] = list(following)
        self.names = [node.name() for node in self.nodes]
        self.outputs = list(map(node_ops.outputs, self.nodes))
        self.next = [_numbered(edges, index) for edges in following.values()]
        self.roots = [index[loss.grad_fn] for loss in losses]
        self.leaves, self.leaf = self._parameters(parameters)
        self.reaches = self._reaching()
        self.wanted = list(map(self._wanted, self.next))

    def _wanted(self, edges: Sequence[Edge | None]) -> dict[int, Edge]:
        found: dict[int, Edge] = {}
        for slot, edge in enumerate(edges):
            if edge is not None and self.reaches[edge[0]]:
                found[slot] = edge
        return found

    def _parameters(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], dict[int, int]]:
        """Every parameter in the graph, and node -> index of the shared ones."""
        which = {id(p): j for j, p in enumerate(parameters)}
        leaves: list[Tensor] = []
        leaf: dict[int, int] = {}
        for i, name in enumerate(self.names):
            if name == ACCUMULATE:
                variable = self.nodes[i].variable
                leaves.append(variable)
                if id(variable) in which:
                    leaf[i] = which[id(variable)]
        return leaves, leaf

    def _reaching(self) -> list[bool]:
        found = [False] * len(self.nodes)
        # from the parameters up: what is below a node is numbered after it
        for i in reversed(range(len(self.nodes))):
            if i in self.leaf:
                found[i] = True
                continue
            for edge in self.next[i]:
                if edge is not None and found[edge[0]]:
                    found[i] = True
                    break
        return found

    @cached_property
    def foreign(self) -> frozenset[int]:
        """Nodes above a shared parameter whose backward is somebody's own, and thus need not be linear."""
        found: list[int] = []
        for i, name in enumerate(self.names):
            if self.reaches[i] and node_ops.is_foreign(self.nodes[i], stem(name)):
                found.append(i)
        return frozenset(found)

    def below(self, i: int) -> list[Edge]:
        """The edges to where the gradients of a node's inputs go."""
        return [edge for edge in self.next[i] if edge is not None]

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision that the recorded graph computes in."""
        dtypes = {meta.dtype for meta in chain.from_iterable(self.outputs)}
        floating = [dtype for dtype in dtypes if dtype.is_floating_point]
        return max(floating, key=lambda dtype: torch.finfo(dtype).eps)

    def signature(self) -> Hashable:
        """Structure, shapes and integer arguments as a key: what one plan serves."""
        parts = []
        for i, name in enumerate(self.names):
            if self.reaches[i] and name != ACCUMULATE:
                shapes = tuple([(tuple(m.shape), m.dtype) for m in self.outputs[i]])
                parts.append((i, name, self.next[i], node_ops.integers(self.nodes[i]), shapes))
        return self._tops(), tuple(self.leaf.items()), tuple(parts)

    def structure(self) -> Hashable:
        """Nodes, how they are joined, their precision and dimensions, but not their sizes, as a key."""
        parts = []
        for i, name in enumerate(self.names):
            if self.reaches[i] and name != ACCUMULATE:
                kinds = tuple((len(m.shape), m.dtype) for m in self.outputs[i])
                parts.append((i, name, self.next[i], node_ops.dimensions(self.nodes[i]), kinds))
        counts = tuple(map(len, self.losses))
        return self._tops(), counts, tuple(self.leaf.items()), tuple(parts)

    def _tops(self) -> tuple[Edge, ...]:
        """The output of the graph that each loss is."""
        roots = zip(self.roots, self.losses, strict=True)
        return tuple((i, loss.output_nr) for i, loss in roots)

    def shape(self, edge: Edge) -> tuple[int, ...]:
        """The shape of a node's output."""
        return tuple(self.outputs[edge[0]][edge[1]].shape)

    def edges(self, nodes: Sequence[int]) -> list[GradientEdge]:
        """Handles on the gradients of all outputs of some nodes, for `backward`."""
        return [GradientEdge(self.nodes[i], k) for i in nodes for k in range(len(self.outputs[i]))]

    def release(self) -> None:
        """Free what the graph saved, and what a pass that did not keep it has left."""
        kept = [loss for task, loss in enumerate(self.losses) if task not in self._freed]
        done = self._region(self.roots[task] for task in self._freed)
        ends = self._ends(done)
        # Below what was freed nothing runs again, not even on the way to an end of its own.
        spent = self._under(node for node, _ in ends if node in done)
        until = [GradientEdge(self.nodes[i], k) for i, k in sorted(ends) if i not in spent]
        if kept and until:
            node_ops.release(kept, until)

    def _ends(self, done: set[int]) -> set[Edge]:
        """Where a pass that frees what is not done may stop."""
        found: set[Edge] = set()
        for i in range(len(self.nodes)):
            if i in done:
                continue
            for edge in self.below(i):
                if self._ends_at(edge, done):
                    found.add(edge)
        return found

    def _under(self, nodes: Iterable[int]) -> set[int]:
        """The nodes below some nodes, without these themselves unless one is below another."""
        return self._region(below for node in nodes for below, _ in self.below(node))

    def _ends_at(self, edge: Edge, done: set[int]) -> bool:
        """Whether an edge leads to what was freed, or to a node that hands nothing on."""
        return edge[0] in done or not self.next[edge[0]]

    def backward(
        self,
        task: int,
        edges: Sequence[GradientEdge],
        weights: Tensor | None = None,
        keep: bool = True,
    ) -> Grads:
        """Gradients of a task's losses at the edges, under row weights (1 by default); no weight gradients."""
        if not edges:
            return ()
        loss = self.losses[task]
        if weights is None:
            weights = torch.ones_like(loss)
        if not keep:
            self._freed.add(task)
        return torch.autograd.grad([loss], edges, [weights], retain_graph=keep, allow_unused=True)

    def vjp(self, i: int, grads: dict[int, Tensor]) -> list[tuple[int, Edge, Tensor]]:
        """The local vjp of one node: gradients of some outputs in, (slot, edge, gradient) of its inputs out."""
        given = [grads.get(k) for k in range(len(self.outputs[i]))]
        returned = node_ops.vjp(self.nodes[i], given)
        found = []
        for slot, edge in self.wanted[i].items():
            g = returned[slot]
            if g is not None:
                found.append((slot, edge, node_ops.conformed(g, self.nodes[edge[0]], edge[1])))
        return found

    def region(self, edges: Iterable[Edge]) -> list[int]:
        """Nodes at and below some edges that reach a shared parameter, in topological order."""
        return sorted(i for i in self._region(edge[0] for edge in edges) if self.reaches[i])

    def _region(self, nodes: Iterable[int]) -> set[int]:
        found: set[int] = set()
        stack = list(nodes)
        while stack:
            i = stack.pop()
            if i not in found:
                found.add(i)
                stack += [node for node, _ in self.below(i)]
        return found


def _numbered(edges: node_ops.Following, index: dict[Any, int]) -> tuple[Edge | None, ...]:
    """A node's `next_functions` with numbers in the place of nodes."""
    return tuple([None if node is None else (index[node], k) for node, k in edges])
