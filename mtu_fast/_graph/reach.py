"""Which rows reach which elements of a node's inputs, where its structure does not say: an experiment.

The node's own adjoint is run on gradients in which only some of the rows are alive: those whose
number has a binary digit set, and those that have not, digit after digit. An element that one row
alone reaches is exactly zero whenever that row is not alive, in any precision and however small the
row is beside others; an element that two rows reach is alive in both runs of the digit in which
they differ. 2 log₂ N runs of one node, no tolerance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtu_fast._graph import nodes as node_ops
from mtu_fast._graph.carry import stem
from mtu_fast._graph.lookups import BY_INDEX
from mtu_fast._graph.moves import SETTLED
from mtu_fast._graph.rowmap import NO_ROW, Ids, compact

# slot of the node -> the map of that input's gradient, None where rows meet
Reached = dict[int, Ids | None]


def reach(node: Any, maps: Sequence[Ids | None], slots: Collection[int], count: int) -> Reached:
    """The maps of a node's inputs, from those of its outputs.

    Args:
        node: an autograd node whose saved tensors are there.
        maps: of each output's gradient, None where there is none.
        slots: the inputs that are asked for.
        count: the number of rows N.

    Returns:
        For each slot its map (NO_ROW throughout if no gradient comes), or None where two rows meet
        in one element.
    """
    probes = [None if ids is None else _Probe(node, k, ids) for k, ids in enumerate(maps)]
    found: dict[int, Tensor] = {}
    open_slots = set(slots)
    for digit in range(max(1, (count - 1).bit_length())):
        on, off = (_alive(node, probes, digit, value, open_slots) for value in (1, 0))
        for slot in sorted(open_slots):
            if slot in on and slot in off and bool((on[slot] & off[slot]).any()):
                open_slots.discard(slot)
                continue
            for value, alive in ((1, on), (0, off)):
                if slot in alive:
                    ids = found.setdefault(
                        slot, torch.full(alive[slot].shape, NO_ROW, device=alive[slot].device)
                    )
                    ids.copy_(torch.where(alive[slot], ids.clamp(min=0) | value << digit, ids))
    return {
        slot: _map(node, slot, found.get(slot)) if slot in open_slots else None for slot in slots
    }


def _map(node: Any, slot: int, ids: Tensor | None) -> Ids:
    child, k = node.next_functions[slot]
    return (
        np.full([1] * len(node_ops.outputs(child)[k].shape), NO_ROW)
        if ids is None
        else compact(ids.cpu().numpy())
    )


def ask(node: Any, maps: Sequence[Ids | None], slots: Collection[int], count: int) -> Reached:
    """As `reach`, but by the index that the node saved where it is a look-up."""
    found: Reached = {}
    look_up = BY_INDEX.get(stem(node.name()))
    if look_up is not None and maps[0] is not None:
        out = tuple(node_ops.outputs(node)[0].shape)
        for slot in slots:
            child, k = node.next_functions[slot]
            for ids in look_up(node, slot, out, tuple(node_ops.outputs(child)[k].shape), maps[0]):
                found[slot] = ids if ids is None else compact(ids)
    left = [slot for slot in slots if slot not in found]
    return found | reach(node, maps, left, count) if left else found


def agree(now: Reached, then: Mapping[int, Ids | None]) -> bool:
    """Whether maps that were found then hold now: rows meet where they met, and come only to places of their own."""
    return all(
        (mine := now[slot]) is not None and _within(mine, ids)
        for slot, ids in then.items()
        if ids is not None
    )


def _within(now: Ids, then: Ids) -> bool:
    return bool(((now == then) | (now < 0)).all())


class _Probe:
    """A gradient of one output in which rows can be switched on and off."""

    def __init__(self, node: Any, output: int, ids: Ids) -> None:
        meta = node_ops.outputs(node)[output]
        self.ids = torch.from_numpy(ids.copy()).to(meta.device)
        if stem(node.name()) in SETTLED:
            # Sums of ones never cancel.
            self.values = torch.ones((), dtype=meta.dtype, device=meta.device).expand(
                tuple(meta.shape)
            )
        else:
            # Nothing that is zero for arbitrary numbers is so by chance.
            noise = (
                torch.rand(tuple(meta.shape), generator=torch.Generator().manual_seed(output)) + 0.5
            )
            self.values = noise.to(meta.dtype).to(meta.device)

    def alive(self, digit: int, value: int) -> Tensor:
        chosen = (self.ids >= 0) & ((self.ids >> digit & 1) == value)
        return torch.where(chosen, self.values, 0)


def _alive(
    node: Any, probes: Sequence[_Probe | None], digit: int, value: int, slots: Collection[int]
) -> dict[int, Tensor]:
    """Which elements of the inputs are not zero when the rows with this digit are alive."""
    given = node_ops.vjp(
        node, [None if probe is None else probe.alive(digit, value) for probe in probes]
    )
    following = node.next_functions
    return {
        slot: node_ops.conformed(g, *following[slot]) != 0
        for slot, g in enumerate(given)
        if slot in slots and g is not None
    }
