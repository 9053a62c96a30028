"""How the adjoint of a view or a copy moves the rows of its output gradient to its inputs, as whole numbers say.

Each entry of `MOVES` is a function of a `Passage` and the map of the output's gradient. It returns
the map of the input's gradient, NO_ROW where none arrives, or None where it does not know. What
adds up as it moves (repeat, unfold) is found by experiment (`reach.py`), once; so is as_strided,
but in every step, since it depends on how its input lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtu_fast._graph.carry import Passage, Shape, signed
from mtu_fast._graph.nodes import outputs
from mtu_fast._graph.rowmap import NO_ROW, Ids, reshaped
from mtu_fast._graph.table import Table

Move = Callable[[Passage, Ids], Ids | None]

MOVES: Table[Move] = Table()

# Ops that move, or add up, as shapes and whole numbers say: an experiment on them need not be
# repeated.
SETTLED = frozenset((
    "ConstantPadNd",
    "Diagonal",
    "DiagEmbed",
    "Narrow",
    "Repeat",
    "Roll",
    "Rot90",
    "Unfold",
))


@MOVES.entry("View UnsafeView ReshapeAlias Unsqueeze Squeeze")
def reshape(at: Passage, ids: Ids) -> Ids:
    """Elements keep their order."""
    return reshaped(ids, at.out, at.into)


@MOVES.entry("Select")
def select(at: Passage, ids: Ids) -> Ids:
    """One position of the input."""
    dim = _dim(at)
    place = signed(at.node._saved_index) % at.into[dim]
    return _one_placed(ids, dim, at.into[dim], place)


@MOVES.entry("Unbind")
def unbind(at: Passage, ids: Ids) -> Ids:
    """One position an output."""
    dim = _dim(at)
    return _one_placed(ids, dim, at.into[dim], at.output)


@MOVES.entry("Slice")
def slice_(at: Passage, ids: Ids) -> Ids:
    """Every so many positions from a first one."""
    dim = _dim(at)
    start, step = signed(at.node._saved_start or 0), at.node._saved_step
    if start < 0:  # counted from the end, and cut there as by Python
        start = max(start + at.into[dim], 0)
    stop = start + at.out[dim] * step
    return _placed(ids, dim, at.into[dim], range(start, stop, step))


@MOVES.entry("Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes")
def split(at: Passage, ids: Ids) -> Ids:
    """A run of positions an output."""
    dim = _dim(at)
    before = outputs(at.node)[: at.output]
    # output k begins where the ones before it end
    start = sum(meta.shape[dim] for meta in before)
    return _placed(ids, dim, at.into[dim], range(start, start + at.out[dim]))


@MOVES.entry("Stack")
def stack(at: Passage, ids: Ids) -> Ids:
    """One position of the output an input."""
    dim = signed(at.node._saved_dim) % len(at.out)
    # size 1: the row does not depend on which of the stacked it is
    place = at.slot if ids.shape[dim] > 1 else 0
    # with an ellipsis, what is left of one dimension is an array and no number
    return ids[(slice(None),) * dim + (place, ...)]


@MOVES.entry("Cat")
def cat(at: Passage, ids: Ids) -> Ids | None:
    """A run of positions of the output an input; None where inputs of unknown size lie on both sides."""
    dim = signed(at.node._saved_dim) % len(at.out)
    if ids.shape[dim] == 1:
        return ids
    start = _start(at, dim)
    if start is None:
        return None
    return ids[_at(dim, slice(start, start + at.into[dim]))]


def _start(at: Passage, dim: int) -> int | None:
    """Where the part of a `cat` begins; None where it cannot be told."""
    sizes = [_size(child, k, dim, len(at.out)) for child, k in at.node.next_functions]
    before, after = sizes[: at.slot], sizes[at.slot + 1 :]
    if None not in before:
        return _total(before)
    # counted from the other end
    if None not in after:
        return at.out[dim] - at.into[dim] - _total(after)
    return None


def _size(child: Any, output: int, dim: int, ndim: int) -> int | None:
    """How long a part of a `cat` is; None for a constant, which has no node."""
    if child is None:
        return None
    shape: Shape = outputs(child)[output].shape
    return shape[dim] if len(shape) == ndim else 0  # an empty tensor may have any dimensions


def _total(sizes: Sequence[int | None]) -> int:
    return sum(size or 0 for size in sizes)


@MOVES.entry("Flip")
def flip(at: Passage, ids: Ids) -> Ids:
    """Positions in the opposite order."""
    dims = [signed(d) % len(at.into) for d in at.node._saved_dims]
    return np.flip(ids, tuple(dims))


@MOVES.entry("Roll")
def roll(at: Passage, ids: Ids) -> Ids | None:
    """Positions shifted in a circle, back again."""
    dims = [signed(d) % len(at.into) for d in at.node._saved_dims]
    # the adjoint of a shift is the shift back
    back = [-signed(shift) for shift in at.node._saved_shifts]
    return np.roll(ids, back, dims) if dims else None


def _dim(at: Passage) -> int:
    """The dimension of the input that a node works along."""
    return signed(at.node._saved_dim) % len(at.into)


def _one_placed(ids: Ids, dim: int, size: int, place: int) -> Ids:
    """The same for one position, whose dimension the output has lost."""
    return _placed(np.expand_dims(ids, dim), dim, size, range(place, place + 1))


def _placed(ids: Ids, dim: int, size: int, where: range) -> Ids:
    """A map of `size` positions along a dimension, of which these hold the given ones in turn and the others no row."""
    if len(where) == size and ids.shape[dim] == 1:
        return ids  # all positions, of one row: the map stays compact
    shape = list(ids.shape)
    shape[dim] = size
    found = np.full(shape, NO_ROW)
    found[_at(dim, slice(where.start, where.stop, where.step))] = ids
    return found


def _at(dim: int, places: slice) -> tuple[slice, ...]:
    """An index of these places along a dimension."""
    return (slice(None),) * dim + (places,)
