"""The recorded autograd graph of the losses: its nodes by number, losses first, and passes through it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtu_fast._graph import nodes as node_ops
from mtu_fast._graph.nodes import Grads
from mtu_fast._graph.pattern import Edge, Pattern


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
        pattern: what graphs of later steps may have in common with it.
    """

    def __init__(
        self,
        losses: Sequence[Tensor],
        parameters: Sequence[Tensor],
        patterns: Sequence[Pattern] = (),
    ) -> None:
        self.losses = losses
        self._freed: set[int] = set()  # tasks whose pass did not keep the graph
        # by identity: tensors compare element by element
        which = {id(p): j for j, p in enumerate(parameters)}
        self.pattern, self.nodes = _known(losses, which, patterns) or _new(losses, which)
        self.names, self.outputs = self.pattern.names, self.pattern.outputs
        self.next, self.wanted = self.pattern.next, self.pattern.wanted
        self.leaf, self.reaches = self.pattern.leaf, self.pattern.reaches
        self.roots = [i for i, _ in self.pattern.tops]
        self.leaves = self.pattern.leaves(self.nodes)

    @property
    def foreign(self) -> frozenset[int]:
        """Nodes above a shared parameter whose backward is somebody's own, and thus need not be linear."""
        return self.pattern.foreign

    def below(self, i: int) -> list[Edge]:
        """The edges to where the gradients of a node's inputs go."""
        return self.pattern.below(i)

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision that the recorded graph computes in."""
        return self.pattern.dtype

    def signature(self) -> Hashable:
        """Structure, shapes and integer arguments as a key: what one plan serves."""
        return self.pattern.signature

    def structure(self) -> Hashable:
        """Nodes, how they are joined, their precision and dimensions, but not their sizes, as a key."""
        return self.pattern.structure(tuple(map(len, self.losses)))

    def shape(self, edge: Edge) -> tuple[int, ...]:
        """The shape of a node's output."""
        return tuple(self.outputs[edge[0]][edge[1]].shape)

    def edges(self, nodes: Sequence[int]) -> list[GradientEdge]:
        """Handles on the gradients of all outputs of some nodes, for `backward`."""
        return [GradientEdge(self.nodes[i], k) for i in nodes for k in range(len(self.outputs[i]))]

    def release(self) -> None:
        """Free what the graph saved, and what a pass that did not keep it has left."""
        # of the others the pass has freed its part already
        kept = [loss for task, loss in enumerate(self.losses) if task not in self._freed]
        if not kept:
            return
        ends = self.pattern.ends(frozenset(self.roots[task] for task in self._freed))
        if ends:
            node_ops.release(kept, [GradientEdge(self.nodes[i], k) for i, k in ends])

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
        # with edges as inputs, the engine skips the gradients of weights
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
        found = self.pattern.region([edge[0] for edge in edges])
        return sorted(i for i in found if self.reaches[i])


def _known(
    losses: Sequence[Tensor], which: Mapping[int, int], patterns: Sequence[Pattern]
) -> tuple[Pattern, list[Any]] | None:
    """The pattern that the losses' graph has, and its nodes; None where it has none of these."""
    for pattern in patterns:
        nodes = pattern.nodes_of(losses, which)
        if nodes is not None:
            return pattern, nodes
    return None


def _new(losses: Sequence[Tensor], which: Mapping[int, int]) -> tuple[Pattern, list[Any]]:
    """The pattern of a graph that has none of those known."""
    following = node_ops.below([loss.grad_fn for loss in losses])
    nodes = list(following)
    index = {node: i for i, node in enumerate(nodes)}
    tops = tuple((index[loss.grad_fn], loss.output_nr) for loss in losses)
    return Pattern(nodes, list(following.values()), tops, which), nodes
