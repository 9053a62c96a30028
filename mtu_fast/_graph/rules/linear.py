"""Matrix products: rows are outer products of the two sides, `Σ_s a[s] ⊗ b[s]`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from mtu_fast._graph.rowmap import Ids, RowMap
from mtu_fast._graph.rules.base import Shape, rule, scaled, summed
from mtu_fast._rows.uses import Outer, Stacked, Use


@rule("AddmmBackward0")
def addmm(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = beta·bias + alpha·mat1 @ mat2`, b `[M, O]`."""
    if slot == 0:
        return summed(scaled(b, node._saved_beta), rows, shape)
    b = scaled(b, node._saved_alpha)
    return _product(node, slot - 1, shape, b, rows, ("_saved_mat1", "_saved_mat2"))


@rule("MmBackward0")
def mm(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = self @ mat2`, b `[M, O]`."""
    return _product(node, slot, shape, b, rows, ("_saved_self", "_saved_mat2"))


@rule("MvBackward0", slots=(1,))
def mv(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = self @ vec`, b `[M]`."""
    each = b[:, None] * node._saved_self.detach()
    sizes = tuple(each.shape)
    of_each = rows.derived(sizes, lambda: RowMap(rows.ids[:, None], sizes, rows.count))
    return summed(each, of_each, shape)


@rule("BmmBackward0")
def bmm(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out[e] = self[e] @ mat2[e]`, b `[E, M, O]`, rows along M (or O): one outer product per batch entry."""
    return _batched(node, slot, shape, b, rows, ("_saved_self", "_saved_mat2"))


@rule("BaddbmmBackward0")
def baddbmm(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out[e] = beta·self[e] + alpha·batch1[e] @ batch2[e]`, b `[E, M, O]`."""
    if slot == 0:
        return summed(scaled(b, node._saved_beta), rows, shape)
    b = scaled(b, node._saved_alpha)
    return _batched(node, slot - 1, shape, b, rows, ("_saved_batch1", "_saved_batch2"))


@rule("GroupedMmBackward0", slots=(1,))
def grouped_mm(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out[group e] = self[group e] @ mat2[e]`, groups being runs of positions: b `[M, O]`, mat2 `[E, I, O]`."""
    a, ends = node._saved_self.detach(), node._saved_offs
    if a.dim() != 2 or len(shape) != 3 or rows.dim != 0 or ends is None:
        return None
    parts, start = [], 0
    for end in ends.tolist():
        group = slice(start, end)
        of_group = _positions(rows.along[group], rows.count)
        left, right = of_group.split(a[group], 0), of_group.split(b[group], 0)
        parts.append(Outer(shape[1:], left, right))
        start = end
    return Stacked(shape, tuple(parts), tuple(range(len(parts))))


def _batched(
    node: Any, side: int, shape: Shape, b: Tensor, rows: RowMap, saved: tuple[str, str]
) -> Use | None:
    """The parameter is the first factor (side 0: rows along the columns of b) or the second (side 1: along its rows).

    Which rows they are may differ from one batch entry to the next: tokens that are sent to
    experts.
    """
    contracted = 2 - side  # the dimension of b that the product with the other factor sums over
    kept, entries = rows.ids.shape[side + 1], rows.ids.shape[0]
    if kept > 1 or rows.ids.shape[contracted] == 1 < entries:
        return None
    other = getattr(node, saved[contracted - 1]).detach()
    parts = []
    for e in range(b.shape[0]):
        of_entry = rows.derived((e, contracted), partial(_of_entry, rows, e, contracted))
        sides = [of_entry.split(other[e], contracted - 1), of_entry.split(b[e], contracted - 1)]
        left, right = sides if side == 1 else reversed(sides)
        parts.append(Outer(shape[1:], left, right))
    if len(parts) == 1:
        return replace(parts[0], shape=shape)
    return Stacked(shape, tuple(parts), tuple(range(len(parts))))


def _of_entry(rows: RowMap, e: int, contracted: int) -> RowMap:
    """The map of the positions of one batch entry along a dimension."""
    # one entry or position may stand for all
    known = rows.ids[min(e, len(rows.ids) - 1)].reshape(-1)
    return _positions(np.broadcast_to(known, rows.shape[contracted]), rows.count)


def _positions(along: Ids, count: int) -> RowMap:
    """The map of positions `[S, …]` of these rows."""
    return RowMap(along[:, None], (len(along), 1), count)


def _product(
    node: Any, side: int, shape: Shape, b: Tensor, rows: RowMap, saved: tuple[str, str]
) -> Outer | None:
    """The parameter is mat1 (side 0: rows along the columns of b) or mat2 (side 1: rows along its rows)."""
    contracted = 1 - side
    if rows.dim != contracted:
        return None
    other = getattr(node, saved[contracted]).detach()
    # mat1ᵀ b sums over M, b mat2ᵀ over O: in both the contracted dimension of `other` is where b
    # has its rows.
    parts = [rows.split(other, contracted), rows.split(b, contracted)]
    left, right = parts if side == 1 else reversed(parts)
    return Outer(shape, left, right)
