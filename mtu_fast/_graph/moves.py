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

Move = Callable[[Any, int, int, Shape, Shape, Ids], Ids | None]

MOVES: dict[str, Move] = {}

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


def moves(ops: str) -> Callable[[Move], Move]:
    """Register a function for some ops."""

    def register(function: Move) -> Move:
        for op in ops.split():
            if op in MOVES:
                raise ValueError(f"two entries for {op}")
            MOVES[op] = function
        return function

    return register


@moves("View UnsafeView ReshapeAlias Unsqueeze Squeeze")
def reshape(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """Elements keep their order."""
    return reshaped(ids, out, into)


@moves("Select")
def select(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """One position of the input."""
    dim = signed(node._saved_dim) % len(into)
    return _placed(
        np.expand_dims(ids, dim), dim, into[dim], [signed(node._saved_index) % into[dim]]
    )


@moves("Unbind")
def unbind(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """One position an output."""
    dim = signed(node._saved_dim) % len(into)
    return _placed(np.expand_dims(ids, dim), dim, into[dim], [output])


@moves("Slice")
def slice_(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """Every so many positions from a first one."""
    dim = signed(node._saved_dim) % len(into)
    start = signed(node._saved_start or 0)
    start = max(start + into[dim], 0) if start < 0 else start
    return _placed(
        ids, dim, into[dim], range(start, start + out[dim] * node._saved_step, node._saved_step)
    )


@moves("Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes")
def split(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """A run of positions an output."""
    dim = signed(node._saved_dim) % len(into)
    start = sum(meta.shape[dim] for meta in outputs(node)[:output])
    return _placed(ids, dim, into[dim], range(start, start + out[dim]))


@moves("Stack")
def stack(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """One position of the output an input."""
    dim = signed(node._saved_dim) % len(out)
    at = slot if ids.shape[dim] > 1 else 0
    return ids[(slice(None),) * dim + (at, ...)]


@moves("Cat")
def cat(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids | None:
    """A run of positions of the output an input; None where inputs of unknown size lie on both sides."""
    dim = signed(node._saved_dim) % len(out)
    sizes = [None if child is None else outputs(child)[k].shape for child, k in node.next_functions]
    known = [
        None if shape is None else shape[dim] if len(shape) == len(out) else 0 for shape in sizes
    ]
    before, after = known[:slot], known[slot + 1 :]
    if None not in before:
        start = sum(size or 0 for size in before)
    elif None not in after:
        start = out[dim] - into[dim] - sum(size or 0 for size in after)
    else:
        return None
    return (
        ids
        if ids.shape[dim] == 1
        else ids[(slice(None),) * dim + (slice(start, start + into[dim]),)]
    )


@moves("Flip")
def flip(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids:
    """Positions in the opposite order."""
    return np.flip(ids, tuple(signed(d) % len(into) for d in node._saved_dims))


@moves("Roll")
def roll(node: Any, output: int, slot: int, out: Shape, into: Shape, ids: Ids) -> Ids | None:
    """Positions shifted in a circle, back again."""
    dims = [signed(d) % len(into) for d in node._saved_dims]
    return np.roll(ids, [-signed(shift) for shift in node._saved_shifts], dims) if dims else None


def _placed(ids: Ids, dim: int, size: int, where: Sequence[int]) -> Ids:
    """A map of `size` positions along a dimension, of which these hold the given ones in turn and the others no row."""
    shape = list(ids.shape)
    if len(where) == size and ids.shape[dim] == 1:
        return ids
    shape[dim] = size
    found = np.full(shape, NO_ROW)
    found.swapaxes(0, dim)[list(where)] = ids.swapaxes(0, dim)
    return found
