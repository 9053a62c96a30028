"""An experiment on a node whose outcome depends on data, to be repeated on every batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtu_fast._graph import nodes as node_ops
from mtu_fast._graph.carry import Shape
from mtu_fast._graph.foreign import foreign, moved, settled
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.lookups import is_lookup, moved_by_index, strays_by_index
from mtu_fast._graph.reach import Places, Probes, Reached, reach, strays
from mtu_fast._graph.rowmap import MEET, Ids, Meet, compact


@dataclass(frozen=True)
class Trial:
    """What one batch has said of a node: found, the maps of some inputs, from those of its outputs.

    maps: of each output's gradient, None where there is none. count: the number of rows N.
    """

    node: int
    maps: tuple[Ids | None, ...]
    found: Mapping[int, Ids]
    count: int

    def doubt(self, graph: Graph, probes: Probes) -> list[Tensor] | None:
        """The same as `strays`, as numbers on the device that are 0 where it does not; None where only a look tells."""
        node = graph.nodes[self.node]
        # a function of one's own is judged on the host
        if foreign(node):
            return None
        by_index: list[Tensor] = []
        left = dict(self.found)
        for slot in [slot for slot in left if is_lookup(node, slot)]:
            said = self._doubt_by_index(node, slot, left.pop(slot), probes.places)
            if said is None:
                return None
            by_index.append(said)
        return by_index + (strays(node, self.maps, left, self.count, probes) if left else [])

    def _doubt_by_index(self, node: Any, slot: int, then: Ids, places: Places) -> Tensor | None:
        ids = self.maps[0]
        if ids is None:
            return None
        return strays_by_index(node, slot, *_shapes(node, slot), ids, then, places.on)

    def strays(self, graph: Graph, probes: Probes) -> bool:
        """Whether the node of another graph of the same signature moves rows to other places."""
        node = graph.nodes[self.node]
        # the index is exact and cheap; experiments are for what it does not say
        by_index = read(node, self.maps, self.found)
        if not all(within(now, self.found[slot]) for slot, now in by_index.items()):
            return True
        left = {slot: ids for slot, ids in self.found.items() if slot not in by_index}
        if not left:
            return False
        if _any(strays(node, self.maps, left, self.count, probes)):
            return True
        return moved(node, self.maps, left, self.count, probes)


def ask(
    node: Any,
    maps: Sequence[Ids | None],
    slots: Collection[int],
    count: int,
    probes: Probes | None = None,
) -> Reached:
    """As `reach`, but by the index that the node saved where it is a look-up."""
    found = read(node, maps, slots)
    left = [slot for slot in slots if slot not in found]
    if not left:
        return found
    probes = probes or Probes()
    return found | settled(node, maps, reach(node, maps, left, count, probes), count, probes)


def read(node: Any, maps: Sequence[Ids | None], slots: Collection[int]) -> Reached:
    """What the index that a look-up saved says of its inputs; nothing for other nodes."""
    found: Reached = {}
    if maps[0] is None:
        return found
    for slot in slots:
        said = moved_by_index(node, slot, *_shapes(node, slot), maps[0])
        if said is not None:
            found[slot] = said if said is MEET else compact(said)
    return found


def _shapes(node: Any, slot: int) -> tuple[Shape, Shape]:
    """Of the first output, and of an input."""
    child, k = node.next_functions[slot]
    return tuple(node_ops.outputs(node)[0].shape), tuple(node_ops.outputs(child)[k].shape)


def within(now: Ids | Meet, then: Ids) -> bool:
    """Whether rows come only to places that were theirs then."""
    return now is not MEET and bool(((now == then) | (now < 0)).all())


def _any(values: Sequence[Tensor]) -> bool:
    """Whether one of some numbers is not zero: a device is waited for once."""
    return bool(values) and bool((torch.stack(list(values)) != 0).any())
