"""Which row does an element of an output gradient belong to?

A row map holds one row number for each position that matters: an integer array with the gradient's
dimensions, each of full size where the row depends on it and of size 1 where it does not. Maps
follow from structure (`carry.py`) or are found by experiment (`reach.py`); numbers of the gradient
itself play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Ids = npt.NDArray[np.int64]
NO_ROW = -1  # instead of a row: no gradient comes here


class Meet(Enum):
    """Instead of a map: two rows meet in some element."""

    MEET = "rows meet"


MEET: Final = Meet.MEET

# What is known of the map of an input; None where nothing is.
Answer = Ids | Meet | None


class Summing(NamedTuple):
    """How gradients are summed to rows that take part of their dimensions.

    Attributes:
        dim: along which rows lie.
        over: dimensions of a gradient split by rows that are summed; none where rows cannot be had so.
        alone: whether these have one element each.
        same: whether the rows are then the gradient as it is.
    """

    dim: int
    over: tuple[int, ...] = ()
    alone: bool = False
    same: bool = False


@dataclass(frozen=True, eq=False)
class RowMap:
    """Which row each element of an output gradient belongs to.

    Attributes:
        ids: int64, NO_ROW where no row reaches; the gradient's dimensions, of size 1 where the row
            does not vary.
        shape: of the gradient.
        count: the number of rows N.
    """

    ids: Ids
    shape: tuple[int, ...]
    count: int

    @cached_property
    def dim(self) -> int | None:
        """The one dimension the row depends on (the first, where it depends on none); None if there are several."""
        varying = [d for d, size in enumerate(self.ids.shape) if size > 1]
        if len(varying) > 1 or not self.shape:
            return None
        return varying[0] if varying else 0

    @cached_property
    def sums(self) -> dict[object, Summing]:
        """What was found of sums, by shapes."""
        return {}

    def derived(self, key: Hashable, make: Callable[[], RowMap]) -> RowMap:
        """A map that follows from this one and the key, made once: what is known of it stays, too."""
        found = self._derived.get(key)
        if found is None:
            found = self._derived[key] = make()
        return found

    @cached_property
    def _derived(self) -> dict[Hashable, RowMap]:
        return {}

    @cached_property
    def along(self) -> Ids:
        """The rows of the positions along `dim`, `[D]`."""
        if self.dim is None:
            raise ValueError("the row depends on more than one dimension")
        return np.broadcast_to(self.ids.reshape(-1), (self.shape[self.dim],))

    @cached_property
    def inner(self) -> int:
        """A where position i along `dim` belongs to row `i // A % N` (sample-major A = S, sample-minor A = 1), or 0."""
        size = len(self.along)
        if size % self.count:  # rows of unequal numbers of positions
            return 0
        # gaps fit any order
        known = self.along >= 0
        index = np.arange(size)
        positions = size // self.count
        # the longest run first: a view is cheaper than an exchange of dimensions
        for a in range(positions, 0, -1):
            if positions % a:
                continue
            expected = index // a % self.count
            if np.array_equal(self.along[known], expected[known]):
                return a
        return 0

    @cached_property
    def _in_order(self) -> int:
        """How many positions there are of rows that come one after the other; -1 where they do not."""
        return self.count * self.inner or -1

    def only(self, b: Tensor, rows: Tensor) -> Tensor:
        """A copy of b for each of some rows, with every element of another row zero: rows `[K]` -> `[K, *b.shape]`."""
        ids = self.on(b.device)
        return torch.where(ids == rows.view(-1, *[1] * b.dim()), b, 0)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Positions along dim become (row, position within the row): `[…, D, …]` -> `[N, S, …]`.

        Rows in no order are padded with zeros to the longest.
        """
        x = x.movedim(dim, 0) if dim else x
        if x.shape[0] == self._in_order:
            # sample-major: position i belongs to row i // A, so a view does
            return x.view(self.count, self.inner, *x.shape[1:])
        if self.inner:
            # [rounds, N, A, …] -> [N, rounds · A, …]: a row comes back once a round
            rounds = x.unflatten(0, (-1, self.count, self.inner))
            return rounds.transpose(0, 1).flatten(1, 2)
        # no regular order: by index, one gather for all rows
        where = self._positions_on(x.device)
        inside = (where >= 0).view(*where.shape, *[1] * (x.dim() - 1))
        return torch.where(inside, x[where.clamp(min=0)], 0)

    def on(self, device: torch.device) -> Tensor:
        """`ids` as a tensor on a device, brought there once."""
        if device not in self._held:
            self._held[device] = torch.from_numpy(self.ids.copy()).to(device)
        return self._held[device]

    def _positions_on(self, device: torch.device) -> Tensor:
        """Positions of each row, `[N, S]`, -1 where a row has fewer than S; brought there once."""
        if device not in self._held_positions:
            of_row = [torch.from_numpy(np.flatnonzero(self.along == r)) for r in range(self.count)]
            found = pad_sequence(of_row, batch_first=True, padding_value=-1)
            self._held_positions[device] = found.to(device)
        return self._held_positions[device]

    @cached_property
    def _held(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def _held_positions(self) -> dict[torch.device, Tensor]:
        return {}


def first(count: int) -> Ids:
    """The map of the losses themselves: one row per value."""
    return np.arange(count)


def merged(one: Ids, other: Ids) -> Ids | Meet:
    """The map of a sum of gradients with these maps, or that two rows meet."""
    if one.shape == other.shape and np.array_equal(one, other):
        return one
    # a sum has a row wherever either part has one, and two where they differ
    both_there = (one >= 0) & (other >= 0)
    if bool((both_there & (one != other)).any()):
        return MEET
    return np.maximum(one, other)  # NO_ROW is below every row


def compact(ids: Ids, fill: bool = False) -> Ids:
    """The same map with size 1 in every dimension that the row does not depend on.

    fill: where no row reaches, any may stand, for there is nothing to be told apart. Not before
    maps are merged, whose rows may reach just there.
    """
    for d, size in enumerate(ids.shape):
        if size > 1:
            # with gaps filled, the highest number along d stands for all of it
            most = ids.max(d, keepdims=True)
            same = ids == most
            if fill:
                same |= ids < 0
            if bool(same.all()):
                ids = most
    return ids


def carried(ids: Ids, along: dict[int, int], into: Sequence[int]) -> Ids | None:
    """The map of an input of which some dimensions `{of ids: of the input}` are carried; None if a row is lost."""
    varying = [d for d, size in enumerate(ids.shape) if size > 1]
    # rows differ along a dimension that the adjoint sums over or mixes
    if not all(d in along for d in varying):
        return None
    # only dimensions of more than one position hold anything to be moved
    order = sorted(varying, key=along.__getitem__)
    shape = [1] * len(into)
    for d in order:
        shape[along[d]] = ids.shape[d]
    rest = [d for d in range(ids.ndim) if d not in varying]  # of size 1 each
    return ids.transpose([*order, *rest]).reshape(shape)


def reshaped(ids: Ids, out: Sequence[int], into: Sequence[int]) -> Ids:
    """The map of a gradient `out` seen as `into`, elements in the same order."""
    if prod(out) == 0:
        return np.full([1] * len(into), ids.max(initial=NO_ROW))  # no element, any map is right
    # Both shapes as groups of one common, finer shape; where there is none, element by element.
    # An end is how many elements lie within so many of the last dimensions.
    ends = sorted({1, *_ends(out), *_ends(into)})
    # [6, 4] seen as [8, 3]: runs of 3 elements and runs of 4 have no common refinement
    if any(b % a for a, b in pairwise(ends)):
        full = np.broadcast_to(ids, tuple(out))
        return compact(full.reshape(tuple(into)))
    fine = [b // a for a, b in pairwise(ends)][::-1]
    return _joined(_split(ids, out, fine), _groups(fine, into))


def _ends(shape: Sequence[int]) -> Iterable[int]:
    """Products of the last sizes of a shape, of one, two, … of them."""
    return accumulate(reversed(shape), mul)


def _split(ids: Ids, shape: Sequence[int], fine: Sequence[int]) -> Ids:
    """A map of a shape as one of a finer shape."""
    sizes: list[int] = []
    for size, known, group in zip(shape, ids.shape, _groups(fine, shape), strict=True):
        sizes += group if known == size else [1] * len(group)
    return compact(ids.reshape(sizes))


def _joined(ids: Ids, groups: Sequence[list[int]]) -> Ids:
    """A map with groups of its dimensions, of these full sizes, made one each."""
    full: list[int] = []
    joined: list[int] = []
    at = 0
    for group in groups:
        own = ids.shape[at : at + len(group)]
        # a group in which the row varies anywhere must be written out in full
        varies = any(n > 1 for n in own)
        full += group if varies else [1] * len(group)
        joined.append(prod(group) if varies else 1)
        at += len(group)
    return np.broadcast_to(ids, full).reshape(joined)


def _groups(fine: Sequence[int], shape: Sequence[int]) -> list[list[int]]:
    """The sizes of a finer shape that make up each dimension of a shape."""
    groups, at = [], 0
    for size in shape:
        start, reached = at, 1
        while reached < size:
            reached *= fine[at]
            at += 1
        groups.append(list(fine[start:at]))
    return groups
