"""Which rows reach which elements of a node's inputs, where its structure does not say: an experiment.

The node's own adjoint is run on gradients in which only some of the rows are alive: those whose
number has a binary digit set, and those that have not, digit after digit. An element that one row
alone reaches is exactly zero whenever that row is not alive, in any precision and however small the
row is beside others; an element that two rows reach is alive in both runs of the digit in which
they differ. 2 log₂ N runs of one node, no tolerance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtu_fast._graph import nodes as node_ops
from mtu_fast._graph.carry import stem
from mtu_fast._graph.moves import SETTLED
from mtu_fast._graph.rowmap import MEET, NO_ROW, Ids, Meet, compact

SMALL = 4096  # numbers of a map whose masks are worth keeping

# slot of the node -> the map of that input's gradient, or that rows meet in it
Reached = dict[int, Ids | Meet]
Grads = dict[int, Tensor]  # slot -> the gradient of that input, where there is one


class Places:
    """Maps as tensors on a device, brought there once: what is known of a plan stays where it is asked for."""

    def __init__(self) -> None:
        self._held: dict[object, tuple[Ids, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": {}}  # by the identity of maps, which a copy does not have

    def on(self, ids: Ids, device: torch.device) -> Tensor:
        """The map, int32: it stays for as long as its plan."""
        key = id(ids), device
        if key not in self._held:
            # the map is held, so that no other one has its identity
            self._held[key] = ids, torch.from_numpy(np.array(ids, np.int32)).to(device)
        return self._held[key][1]


class Probes:
    """What gradients of experiments are made of: arbitrary numbers, and masks of rows; made once for many nodes.

    Args:
        places: of maps that stay the same; by default of this call alone.
    """

    def __init__(self, places: Places | None = None) -> None:
        self.places = places or Places()
        self._numbers: dict[object, Tensor] = {}
        self._masks: dict[object, Tensor] = {}

    def numbers(self, meta: Any, output: int) -> Tensor:
        """Between 0.5 and 1.5, for the gradient of an output: nothing that is zero for them is so by chance.

        The outputs of one node have numbers of their own, since an adjoint may take the difference
        of their gradients.
        """
        key = (tuple(meta.shape), meta.dtype, meta.device, output)
        if key not in self._numbers:
            # by arithmetic, so that nothing is brought to a device: digits of sines that follow no order
            at = torch.arange(prod(key[0]), dtype=torch.float64, device=meta.device)
            at.mul_(12.9898).add_(78.233 * (output + 1)).sin_().mul_(43758.5453).frac_().abs_()
            self._numbers[key] = at.add_(0.5).to(meta.dtype).view(key[0])
        return self._numbers[key]

    def chosen(self, ids: Ids, digit: int, value: int, device: torch.device) -> Tensor:
        """Where there is a row, of which the binary digit has this value."""
        numbers = self.places.on(ids, device)
        if ids.size > SMALL:
            return _chosen(numbers, digit, value)
        key = id(ids), digit, value, device
        if key not in self._masks:
            self._masks[key] = _chosen(numbers, digit, value)
        return self._masks[key]


def _chosen(numbers: Tensor, digit: int, value: int) -> Tensor:
    # NO_ROW has all its bits set, and would count as alive
    return (numbers >= 0) & ((numbers >> digit & 1) == value)


class Experiment:
    """The adjoint of one node under gradients in which some of the rows are alive.

    Args:
        node: an autograd node whose saved tensors are there.
        maps: of each output's gradient, None where there is none.
        count: the number of rows N.
        probes: what the gradients are made of.
        scale: what they are multiplied by.
        others: stands where no row is alive.
    """

    def __init__(
        self,
        node: Any,
        maps: Sequence[Ids | None],
        count: int,
        probes: Probes,
        scale: float = 1.0,
        others: float = 0.0,
    ) -> None:
        self._node = node
        # a single row needs one digit as well, to be switched on and off
        self._digits = max(1, (count - 1).bit_length())
        self._parts: list[_Part | None] = []
        for output, ids in enumerate(maps):
            part = None if ids is None else _Part(node, output, ids, probes, scale, others)
            self._parts.append(part)

    def whole(self, slots: Collection[int]) -> Grads:
        """The inputs' gradients where all rows are alive."""
        return self._run([None if part is None else part.whole() for part in self._parts], slots)

    def beside(self, others: Experiment, digit: int, value: int, slots: Collection[int]) -> Grads:
        """The inputs' gradients where the rows with a digit of this value are as here, and the rest as in another."""
        given: list[Tensor | None] = []
        for part, other in zip(self._parts, others._parts, strict=True):
            if part is None or other is None:
                given.append(None)
            else:
                given.append(part.alive(digit, value) + other.alive(digit, 1 - value))
        return self._run(given, slots)

    def runs(self, slots: Collection[int]) -> Iterator[tuple[int, Grads, Grads]]:
        """For each digit, the inputs' gradients where the rows with it are alive, and where the others are.

        The slots are read anew for every digit.

        Yields:
            The digit, and the gradients of either run.
        """
        for digit in range(self._digits):
            yield digit, self._grads(digit, 1, slots), self._grads(digit, 0, slots)

    def _grads(self, digit: int, value: int, slots: Collection[int]) -> Grads:
        given: list[Tensor | None] = []
        for part in self._parts:
            given.append(None if part is None else part.alive(digit, value))
        return self._run(given, slots)

    def _run(self, given: Sequence[Tensor | None], slots: Collection[int]) -> Grads:
        following = self._node.next_functions
        found: Grads = {}
        for slot, g in enumerate(node_ops.vjp(self._node, given)):
            if slot in slots and g is not None:
                # as the engine would hand it on: broadcasting undone, in the input's dtype
                found[slot] = node_ops.conformed(g, *following[slot])
        return found


class _Part:
    """A gradient of one output in which rows can be switched on and off."""

    def __init__(
        self, node: Any, output: int, ids: Ids, probes: Probes, scale: float, others: float
    ) -> None:
        meta = node_ops.outputs(node)[output]
        self._ids, self._probes, self._device = ids, probes, meta.device
        if stem(node.name()) in SETTLED:
            one = torch.ones((), dtype=meta.dtype, device=meta.device)
            self._values = one.expand(tuple(meta.shape))  # sums of ones never cancel
        else:
            self._values = probes.numbers(meta, output)
        self._others = others
        if scale != 1:
            self._values = self._values * scale

    def whole(self) -> Tensor:
        return self._values * (self._probes.places.on(self._ids, self._device) >= 0)

    def alive(self, digit: int, value: int) -> Tensor:
        chosen = self._probes.chosen(self._ids, digit, value, self._device)
        if self._others == 0:
            # a product keeps zero exactly zero, whatever the value
            return self._values * chosen
        return torch.where(chosen, self._values, self._others)


def reach(
    node: Any,
    maps: Sequence[Ids | None],
    slots: Collection[int],
    count: int,
    probes: Probes | None = None,
) -> Reached:
    """The maps of a node's inputs, from those of its outputs.

    Args:
        node: an autograd node whose saved tensors are there.
        maps: of each output's gradient, None where there is none.
        slots: the inputs that are asked for.
        count: the number of rows N.
        probes: what the gradients are made of.

    Returns:
        For each slot its map (NO_ROW throughout if no gradient comes), or MEET where two rows meet
        in one element.
    """
    left = {slot: _Numbers() for slot in slots}
    found: Reached = {}
    # `left` shrinks meanwhile: a slot where rows meet is asked no further
    for digit, on, off in Experiment(node, maps, count, probes or Probes()).runs(left):
        for slot in list(left):
            if not left[slot].take(digit, on.get(slot), off.get(slot)):
                found[slot] = MEET
                del left[slot]
    for slot, numbers in left.items():
        child, k = node.next_functions[slot]
        found[slot] = numbers.ids(len(node_ops.outputs(child)[k].shape))
    return found


class _Numbers:
    """The row that reaches each element of an input, put together digit by digit."""

    def __init__(self) -> None:
        self._number: Tensor | None = None
        self._reached: Tensor | None = None

    def take(self, digit: int, on: Tensor | None, off: Tensor | None) -> bool:
        """One digit more, by the gradients of its two runs; whether rows are still apart."""
        alive_on = None if on is None else on != 0
        alive_off = None if off is None else off != 0
        if alive_on is not None and alive_off is not None:
            # reached by a row with the digit and by one without it
            both = alive_on & alive_off
            if bool(both.any()):
                return False
        if alive_on is not None:
            self._add(alive_on, 1 << digit)
        if alive_off is not None:
            self._add(alive_off, 0)
        return True

    def _add(self, alive: Tensor, value: int) -> None:
        if self._number is None or self._reached is None:
            self._reached = torch.zeros_like(alive)
            self._number = torch.zeros(alive.shape, dtype=torch.int64, device=alive.device)
        self._reached |= alive
        if value:
            self._number += alive * value

    def ids(self, ndim: int) -> Ids:
        """The map of an input of so many dimensions."""
        if self._number is None or self._reached is None:
            return np.full([1] * ndim, NO_ROW)
        # the one transfer to the host of a whole experiment
        numbers = torch.where(self._reached, self._number, NO_ROW)
        return compact(numbers.cpu().numpy())


def strays(
    node: Any, maps: Sequence[Ids | None], then: Mapping[int, Ids], count: int, probes: Probes
) -> list[Tensor]:
    """Whether any row reaches an element that is another's by the maps of before, or that was none's.

    As `reach` and a comparison, without the maps: an element of a row that is alive in a run of the
    wrong value of some digit is reached by a row that differs in it.

    Returns:
        A number for each run and slot, on the node's device: 0 where no row does.
    """
    found: list[Tensor] = []
    for digit, on, off in Experiment(node, maps, count, probes).runs(then):
        for grads, value in ((on, 1), (off, 0)):
            for slot, g in grads.items():
                if g.numel():
                    # elements whose row, as known, is switched off in this run: they must stay 0
                    of_others = ~probes.chosen(then[slot], digit, value, g.device)
                    found.append((g.abs() * of_others).amax())
    return found
