"""How a convolution walks, and its weight gradient, summed or row by row, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from mtu_fast._ops._blocks import working_dtype


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


def plain_rows(x: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """Weight gradients row by row: x `[R, F, C, *]`, b `[R, F, O, *]` -> `[R, O, C/g, *k]`."""
    dtype = torch.promote_types(working_dtype(x), working_dtype(b))
    if not x.numel() or not b.numel():  # the vendor's call refuses some of these
        return x.new_zeros(x.shape[0], *geometry.weight, dtype=dtype)
    if geometry.pointwise:  # one product per row for all of them
        # the pixels that the taps fall on, one a position
        seen = x[(slice(None),) * 3 + tuple(slice(None, None, step) for step in geometry.stride)]
        left, right = (t.to(dtype).transpose(1, 2).flatten(2) for t in (b, seen))
        return torch.bmm(left, right.mT).view(x.shape[0], *geometry.weight)
    out = x.new_empty(x.shape[0], *geometry.weight, dtype=dtype)
    for row, x_r, b_r in zip(out, x, b, strict=True):
        row.copy_(conv_weight_gradient(x_r.to(dtype), b_r.to(dtype), geometry))
    return out
