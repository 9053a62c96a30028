"""Row gradients from what a use holds: made explicit, or met with one direction.

Inner products with a direction have float64 products and sums, and never form a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mtu_fast.ops._blocks import WIDE, check_images
from mtu_fast.ops._library import define

THIN = 16  # most channels of a group that are
PIECE = 1 << 22  # elements that are widened to float64 at a time: 32 MiB


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks: kernel `(O, C/g, *k)` and the arguments of `aten::convolution`."""

    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps along each axis."""
        return self.weight[2:]

    @property
    def plain(self) -> bool:
        """One group, forward: the kernels of positions apply and output channels may be tiled."""
        return self.groups == 1 and not self.transposed

    @property
    def thin(self) -> bool:
        """Few channels a group, depthwise above all: rows tap by tap (`grouped_rows`), not as products of matrices."""
        return self.weight[1] <= THIN and all(o < s for o, s in zip(self.output_padding, self.stride, strict=True))

    @property
    def pointwise(self) -> bool:
        """A plain one of one tap without padding: a linear map of pixels, every one, or one a stride."""
        return self.plain and prod(self.kernel) == 1 and not any(self.padding)


def working_dtype(t: Tensor) -> torch.dtype:
    """The dtype that row gradients are computed in: the input's, or float32 for half precision."""
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype


def _of_both(x: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(working_dtype(x), working_dtype(b))


def outer_rows(left: Tensor, right: Tensor) -> Tensor:
    """`Σ_s left[r, s] ⊗ right[r, s]`: left `[R, S, A]`, right `[R, S, B]` -> `[R, A, B]`."""
    dtype = working_dtype(left)
    return torch.bmm(left.to(dtype).mT, right.to(dtype))


def conv_weight_gradient(x: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """The convolution's weight gradient summed over images: x `[F, C, *]`, b `[F, O, *]` -> `[O, C/g, *k]`."""
    # The backward asks the weight for its shape alone.
    weight = x.new_empty(1).expand(geometry.weight)
    return torch.ops.aten.convolution_backward(
        b, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.transposed,
        geometry.output_padding, geometry.groups, (False, True, False),
    )[1]  # fmt: skip


def conv_rows(x: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """Weight gradients row by row: x `[R, F, C, *]`, b `[R, F, O, *]` -> `[R, O, C/g, *k]`."""
    if geometry.pointwise:  # one product a row for all of them
        dtype = working_dtype(x)
        seen = x[(slice(None),) * 3 + tuple(slice(None, None, step) for step in geometry.stride)]
        left, right = (t.to(dtype).transpose(1, 2).flatten(2) for t in (b, seen))
        return torch.bmm(left, right.mT).view(x.shape[0], *geometry.weight)
    if geometry.thin:
        if geometry.transposed:
            x, b = b, x
        walk = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
        return grouped_rows(x, b, geometry.groups, *walk)
    return _one_by_one(x, b, geometry)


def _one_by_one(x: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    dtype = _of_both(x, b)
    out = x.new_empty(x.shape[0], *geometry.weight, dtype=dtype)
    for row, x_r, b_r in zip(out, x, b, strict=True):
        row.copy_(conv_weight_gradient(x_r.to(dtype), b_r.to(dtype), geometry))
    return out


def _check_grouped(
    x: Tensor, b: Tensor, groups: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> None:  # fmt: skip
    check_images([x], [b], kernel, stride, padding, dilation, "highest")
    if groups < 1 or x.shape[2] % groups or b.shape[2] % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of {x.shape[2]} and of {b.shape[2]} channels.")


@define(
    "grouped_rows(Tensor x, Tensor b, int groups, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
    check=_check_grouped,
)
def grouped_rows(
    x: Tensor, b: Tensor, groups: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """`rows[r, o, c, δ] = Σ_{f, p} x[r, f, c of o's group, p + δ] · b[r, f, o, p]`: weight gradients row by row.

    For groups of few channels, depthwise convolutions above all; one group is served, too.

    Args:
        x: inputs `[R, F, C, *]`, F images a row.
        b: output gradients `[R, F, O, *]`.
        groups: groups of channels, whose number divides C and O.
        kernel: taps along each axis.
        stride: pixels between positions.
        padding: zeros around an image.
        dilation: pixels between taps.

    Returns:
        `[R, O, C / groups, *kernel]`; float32 for half precision.

    Raises:
        TypeError: complex tensors.
        ValueError: sizes that do not belong together.
    """
    weight = (b.shape[2], x.shape[2] // groups, *kernel)
    none = (0,) * len(kernel)
    geometry = Geometry(weight, tuple(stride), tuple(padding), tuple(dilation), False, none, groups)
    return _one_by_one(x, b, geometry)


@grouped_rows.fake
def _(
    x: Tensor, b: Tensor, groups: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], b.shape[2], x.shape[2] // groups, *kernel, dtype=_of_both(x, b))


def gather_rows(index: Tensor, values: Tensor, size: int) -> Tensor:
    """`Σ_s e_index[r, s] ⊗ values[r, s]`: index `[R, S]`, values `[R, S, D]` -> `[R, size, D]`."""
    r, _, d = values.shape
    offset = torch.arange(r, device=index.device)[:, None] * size
    out = values.new_zeros(r * size, d, dtype=working_dtype(values))
    out.index_add_(0, (index + offset).flatten(), values.to(out.dtype).flatten(0, 1))
    return out.view(r, size, d)


def row_inner(rows: Tensor, d: Tensor) -> Tensor:
    """`⟨rows[r], d⟩`: rows `[R, P]`, d float64 `[P]` -> float64 `[R]`."""
    found = d.new_zeros(len(rows))
    step = max(1, PIECE // max(len(rows), 1))
    for start in range(0, rows.shape[1], step):
        found += rows[:, start : start + step].to(WIDE) @ d[start : start + step]
    return found


def outer_inner(left: Tensor, right: Tensor, d: Tensor) -> Tensor:
    """`Σ_s left[r, s] · d right[r, s]`: left `[R, S, A]`, right `[R, S, B]`, d float64 `[A, B]` -> float64 `[R]`."""
    found = d.new_zeros(len(left))
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
