"""How a convolution walks, and its weight gradient, summed or row by row, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops._tiles import buffer


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
    def pointwise(self) -> bool:
        """A plain one of one tap without padding: a linear map of pixels, every one, or one a stride."""
        return self.plain and prod(self.kernel) == 1 and not any(self.padding)


def conv_weight_gradient(x: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """The convolution's weight gradient summed over images: x `[F, C, *]`, b `[F, O, *]` -> `[O, C/g, *k]`."""
    # The backward asks the weight for its shape alone.
    weight = x.new_empty(1).expand(geometry.weight)
    return torch.ops.aten.convolution_backward(
        b, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.transposed,
        geometry.output_padding, geometry.groups, (False, True, False),
    )[1]  # fmt: skip


def products(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` of batches, in `dtype`; half precision of a GPU is not widened before its tensor cores read it."""
    if left.is_cuda and left.dtype == right.dtype and left.element_size() == 2:
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left.to(dtype), right.to(dtype))


def plain_rows(x: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """Weight gradients row by row: x `[R, F, C, *]`, b `[R, F, O, *]` -> `[R, O, C/g, *k]`."""
    dtype = torch.promote_types(working_dtype(x), working_dtype(b))
    if not x.numel() or not b.numel():  # the vendor's call refuses some of these
        return x.new_zeros(x.shape[0], *geometry.weight, dtype=dtype)
    if geometry.pointwise:  # one product per row for all of them
        # the pixels that the taps fall on, one a position
        seen = x[(slice(None),) * 3 + tuple(slice(None, None, step) for step in geometry.stride)]
        left, right = (t.transpose(1, 2).flatten(2) for t in (b, seen))
        return products(left, right.mT, dtype).view(x.shape[0], *geometry.weight)
    if x.device.type != "cpu":
        return patch_rows(x.to(dtype), b.to(dtype), geometry)
    # a vendor's call a row: on a core as fast as patches, which it never writes
    out = x.new_empty(x.shape[0], *geometry.weight, dtype=dtype)
    for row, x_r, b_r in zip(out, x, b, strict=True):
        row.copy_(conv_weight_gradient(x_r.to(dtype), b_r.to(dtype), geometry))
    return out


def patch_rows(x: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """`plain_rows` from patches that are written, by one product for many rows: few launches, where they cost."""
    if geometry.transposed:  # the same sums, with the sides exchanged
        x, b = b, x
    image = x
    if any(geometry.padding):  # `pad` counts axes from the last
        image = pad(x, [n for axis in reversed(geometry.padding) for n in (axis, axis)])
    out = x.new_empty(len(x), *geometry.weight)
    channels, inputs = geometry.weight[0] // geometry.groups, prod(geometry.weight[1:])
    positions = x.shape[1] * prod(b.shape[3:])
    step = max(1, buffer(x.device) // (geometry.groups * inputs * positions))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        seen = _windows(image[rows], b.shape[3:], geometry)
        # rows and groups are the batch of the product
        patches = seen.reshape(-1, inputs, positions)
        met = b[rows].transpose(1, 2).reshape(-1, channels, positions)
        out[rows] = torch.bmm(met, patches.mT).view_as(out[rows])
    return out


def _windows(image: Tensor, grid: Sequence[int], geometry: Geometry) -> Tensor:
    """What each tap sees at each position, as a view: `[R, F, C, *]` -> `[R, C, *taps, F, *grid]`."""
    axes = len(geometry.kernel)
    along = image.stride()[3:]
    taps = [s * step for s, step in zip(along, geometry.dilation, strict=True)]
    moves = [s * step for s, step in zip(along, geometry.stride, strict=True)]
    sizes = (*image.shape[:3], *geometry.kernel, *grid)
    view = image.as_strided(sizes, (*image.stride()[:3], *taps, *moves), image.storage_offset())
    order = (0, 2, *range(3, 3 + axes), 1, *range(3 + axes, 3 + 2 * axes))
    return view.permute(order)
