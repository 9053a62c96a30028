"""Parameters that meet an activation element by element: rows are sums of b, times what is beside, over positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtu_fast._graph.rowmap import RowMap, compact, reshaped
from mtu_fast._graph.rules.base import Shape, rule, scaled, summed
from mtu_fast._rows.uses import Dense, Use


@rule("AddBackward0")
def add(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = self + alpha·other`."""
    return summed(b if slot == 0 else scaled(b, node._saved_alpha), rows, shape)


@rule("SubBackward0")
def sub(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = self - alpha·other`."""
    return summed(b if slot == 0 else b * -node._saved_alpha, rows, shape)


@rule("MulBackward0")
def mul(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = self · other`."""
    factor = _plain(node._saved_other if slot == 0 else node._saved_self)
    return summed(b * factor, rows, shape)


@rule("ExpandBackward0")
def expand(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = parameter.expand(…)`: a class token, a position embedding."""
    return summed(b, rows, shape)


@rule("RsubBackward0")
def rsub(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = other - alpha·self`."""
    return summed(b if slot == 1 else b * -node._saved_alpha, rows, shape)


@rule("DivBackward0")
def div(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = self / other`."""
    other = _plain(node._saved_other)
    b = b / other
    if slot == 1:
        b = b * -(node._saved_self.detach() / other)  # d(self/other) = -self/other · d other/other
    return summed(b, rows, shape)


@rule("WhereBackward0")
def where(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = self where condition, else other`."""
    chosen = node._saved_condition
    if slot == 1:
        chosen = ~chosen
    return summed(torch.where(chosen, b, 0), rows, shape)


@rule("PreluKernelBackward0", slots=(1,))
def prelu(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = x where x > 0, else weight · x`."""
    slope = node._saved_self.detach().clamp(max=0)  # d out/d weight: x where it is negative
    return summed(b * slope, rows, shape)


@rule("RepeatBackward0")
def repeat(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out = parameter.repeat(…)`: b `[…, k·D, …]` as `[…, k, D, …]`, summed over every k."""
    sizes = (1,) * (b.dim() - len(shape)) + shape
    apart: list[int] = []  # […, k, D, …]
    between: list[int] = []  # […, 1, D, …]
    for whole, size in zip(b.shape, sizes, strict=True):
        apart += [whole // size, size]
        between += [1, size]
    split = tuple(apart)
    of_split = rows.derived(
        split, lambda: RowMap(reshaped(rows.ids, rows.shape, split), split, rows.count)
    )
    use = summed(b.reshape(split), of_split, tuple(between))
    return None if use is None else Dense(shape, use.rows.reshape(-1, *shape))


@rule("IndexPutBackward0", slots=(1,))
def index_put(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out[index] = parameter`: a token in masked places."""
    index = tuple(slice(None) if t is None else t for t in node._saved_indices)
    written = b[index]
    if not written.numel():
        return Dense(shape, b.new_zeros(rows.count, *shape))
    # the map takes the same index as the gradient, so both stay aligned
    of_written = rows.on(b.device).expand(b.shape)[index].numpy(force=True)
    ids = compact(of_written, fill=True)
    return summed(written, RowMap(ids, tuple(written.shape), rows.count), shape)


def _plain(factor: Any) -> Any:
    """A saved factor, a tensor or a number, without its graph."""
    return factor.detach() if isinstance(factor, Tensor) else factor
