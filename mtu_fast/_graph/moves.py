"""How the adjoint of a view or a copy moves the rows of its output gradient to its inputs, as whole numbers say.

Each entry of `MOVES` is a function of `(node, output, slot, out, into, ids)`, out and into being
shapes and ids the map of the output's gradient; it returns the map of the input's gradient, NO_ROW
where none arrives, or None where it does not know. What adds up as it moves (repeat, unfold) is
found by experiment (`reach.py`), once; so is as_strided, but in every step, since it depends on how
its input lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtu_fast._graph.carry import Shape, signed
from mtu_fast._graph.nodes import outputs
from mtu_fast._graph.rowmap import NO_ROW, Ids, reshaped
from mtu_fast._graph.table import Table

Move = Callable[[Any, int, int, Shape, Shape, Ids], Ids | None]

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
def reshape(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """Elements keep their order."""
    return reshaped(ids, out, into)


@MOVES.entry("Select")
def select(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """One position of the input."""
    dim = signed(node._saved_dim) % len(into)
    at = signed(node._saved_index) % into[dim]
    return _placed(np.expand_dims(ids, dim), dim, into[dim], range(at, at + 1))


@MOVES.entry("Unbind")
def unbind(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """One position an output."""
    dim = signed(node._saved_dim) % len(into)
    return _placed(np.expand_dims(ids, dim), dim, into[dim], range(output, output + 1))


@MOVES.entry("Slice")
def slice_(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """Every so many positions from a first one."""
    dim = signed(node._saved_dim) % len(into)
    start, step = signed(node._saved_start or 0), node._saved_step
    if start < 0:
        start = max(start + into[dim], 0)
    return _placed(ids, dim, into[dim], range(start, start + out[dim] * step, step))


@MOVES.entry("Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes")
def split(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """A run of positions an output."""
    dim = signed(node._saved_dim) % len(into)
    start = sum(meta.shape[dim] for meta in outputs(node)[:output])
    return _placed(ids, dim, into[dim], range(start, start + out[dim]))


@MOVES.entry("Stack")
def stack(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """One position of the output an input."""
    dim = signed(node._saved_dim) % len(out)
    at = slot if ids.shape[dim] > 1 else 0
    return ids[(slice(None),) * dim + (at, ...)]


@MOVES.entry("Cat")
def cat(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids | None:
    """A run of positions of the output an input; None where inputs of unknown size lie on both sides."""
    dim = signed(node._saved_dim) % len(out)
    sizes = [_size(child, k, dim, len(out)) for child, k in node.next_functions]
    before, after = sizes[:slot], sizes[slot + 1 :]
    if None not in before:
        start = _total(before)
    elif None not in after:
        start = out[dim] - into[dim] - _total(after)
    else:
        return None
    if ids.shape[dim] == 1:
        return ids
    return ids[(slice(None),) * dim + (slice(start, start + into[dim]),)]


def _size(child: Any, output: int, dim: int, ndim: int) -> int | None:
    """How long a part of a `cat` is; None for a constant, which has no node."""
    if child is None:
        return None
    shape: Shape = outputs(child)[output].shape
    return shape[dim] if len(shape) == ndim else 0  # an empty tensor may have any dimensions


def _total(sizes: Sequence[int | None]) -> int:
    return sum(size or 0 for size in sizes)


@MOVES.entry("Flip")
def flip(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """Positions in the opposite order."""
    return np.flip(ids, tuple(signed(d) % len(into) for d in node._saved_dims))


@MOVES.entry("Roll")
def roll(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids | None:
    """Positions shifted in a circle, back again."""
    dims = [signed(d) % len(into) for d in node._saved_dims]
    back = [-signed(shift) for shift in node._saved_shifts]
    return np.roll(ids, back, dims) if dims else None


def _placed(ids: Ids, dim: int, size: int, where: range) -> Ids:
    """A map of `size` positions along a dimension, of which these hold the given ones in turn and the others no row."""
    if len(where) == size and ids.shape[dim] == 1:
        return ids
    shape = list(ids.shape)
    shape[dim] = size
    found = np.full(shape, NO_ROW)
    found[(slice(None),) * dim + (slice(where.start, where.stop, where.step),)] = ids
    return found
