"""Row gradients from what a use holds: made explicit, or met with one direction.

Inner products with a direction have float64 products and sums, and never form a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from mtu_fast._ops._blocks import WIDE, working_dtype
from mtu_fast._ops._convolution import Geometry, plain_rows, products
from mtu_fast._ops._sums import summed_at
from mtu_fast._ops.grouped import grouped_rows

PIECE = 1 << 22  # elements that are widened to float64 at a time: 32 MiB
THIN = 16  # most channels of a group for which rows are formed tap by tap,
# and, where all channels are one group, most multiply-adds of a row: a vendor's call takes as long
CALL = 10_000_000


def outer_rows(left: Tensor, right: Tensor) -> Tensor:
    """`Σ_s left[r, s] ⊗ right[r, s]`: left `[R, S, A]`, right `[R, S, B]` -> `[R, A, B]`."""
    return products(left.mT, right, working_dtype(left))


def conv_rows(x: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """Weight gradients row by row: x `[R, F, C, *]`, b `[R, F, O, *]` -> `[R, O, C/g, *k]`."""
    positions = prod((x if geometry.transposed else b).shape[3:]) * x.shape[1]
    if not _tap_by_tap(geometry, positions, x.device):
        return plain_rows(x, b, geometry)
    if geometry.transposed:  # the same sums, with the sides exchanged
        x, b = b, x
    return grouped_rows(
        x, b, geometry.groups, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation
    )


def _tap_by_tap(geometry: Geometry, positions: int, device: torch.device) -> bool:
    """Whether taps in place take less than products of matrices: few channels a group, little work a row, or a GPU."""
    # An output padding of a stride or more adds pixels that no position reaches: another grid, to
    # the op.
    reached = all(o < s for o, s in zip(geometry.output_padding, geometry.stride, strict=True))
    if device.type == "cpu":
        few = geometry.groups > 1 or prod(geometry.weight) * positions <= CALL
        reached &= few and geometry.weight[1] <= THIN
    return reached and not geometry.pointwise


def gather_rows(index: Tensor, values: Tensor, size: int) -> Tensor:
    """`Σ_s e_index[r, s] ⊗ values[r, s]`: index `[R, S]`, values `[R, S, D]` -> `[R, size, D]`."""
    r, _, d = values.shape
    # row r of the result has entries r · size …: one index for all rows
    offset = torch.arange(r, device=index.device)[:, None] * size
    wide = values.to(working_dtype(values)).flatten(0, 1)
    return summed_at((index + offset).flatten(), wide, r * size).view(r, size, d)


def row_inner(rows: Tensor, d: Tensor) -> Tensor:
    """`⟨rows[r], d⟩`: rows `[R, P]`, d float64 `[P]` -> float64 `[R]`."""
    found = d.new_zeros(len(rows))
    step = max(1, PIECE // max(len(rows), 1))
    for start in range(0, rows.shape[1], step):
        found += rows[:, start : start + step].to(WIDE) @ d[start : start + step]
    return found


def rows_sum(rows: Tensor, w: Tensor) -> Tensor:
    """`Σ_r w[r] rows[r]` in the dtype of w: rows `[R, P]` are converted a piece at a time -> `[P]`."""
    step = max(1, PIECE // max(len(rows), 1))
    if rows.shape[1] <= step:
        return w @ rows.to(w.dtype)
    found = w.new_empty(rows.shape[1])
    for start in range(0, rows.shape[1], step):
        found[start : start + step] = w @ rows[:, start : start + step].to(w.dtype)
    return found


def outer_inner(left: Tensor, right: Tensor, d: Tensor) -> Tensor:
    """`Σ_s left[r, s] · d right[r, s]`: left `[R, S, A]`, right `[R, S, B]`, d float64 `[A, B]` -> float64 `[R]`."""
    found = d.new_zeros(len(left))
    if left.shape[2] > right.shape[2]:  # the product is as wide as the narrower side
        left, right, d = right, left, d.T
    for some in _pieces(left, right):
        found[some] = ((right[some].to(WIDE) @ d.T) * left[some].to(WIDE)).sum((1, 2))
    return found


def conv_inner(x: Tensor, b: Tensor, geometry: Geometry, d: Tensor) -> Tensor:
    """`⟨x * d, b⟩`, a convolution forward with d as its weight: x `[R, F, C, *]`, b `[R, F, O, *]` -> float64 `[R]`."""
    found = d.new_zeros(len(x))
    for some in _pieces(x, b):
        y = torch.ops.aten.convolution(
            x[some].to(WIDE).flatten(0, 1), d, None, geometry.stride, geometry.padding, geometry.dilation,
            geometry.transposed, geometry.output_padding, geometry.groups,
        )  # fmt: skip
        # the adjoint of the weight gradient: ⟨∂/∂W, d⟩ = ⟨conv(x, d), b⟩
        found[some] = (y.view(b[some].shape) * b[some].to(WIDE)).flatten(1).sum(1)
    return found


def gather_inner(index: Tensor, values: Tensor, d: Tensor) -> Tensor:
    """`Σ_s values[r, s] · d[index[r, s]]`: index `[R, S]`, values `[R, S, D]`, d float64 `[V, D]` -> float64 `[R]`."""
    found = d.new_zeros(len(values))
    for some in _pieces(values, values):
        found[some] = (values[some].to(WIDE) * d[index[some]]).sum((1, 2))
    return found


def _pieces(left: Tensor, right: Tensor) -> Iterator[slice]:
    """Ranges of rows of which both sides together are a piece."""
    step = max(1, PIECE * len(left) // max(left.numel() + right.numel(), 1))
    for start in range(0, len(left), step):
        yield slice(start, start + step)
