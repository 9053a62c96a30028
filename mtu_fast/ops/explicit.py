"""Row gradients made explicit, from what a use holds: what the direct routes multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        """One group, forward: the pixel Gram applies and output channels may be tiled."""
        return self.groups == 1 and not self.transposed


def working_dtype(t: Tensor) -> torch.dtype:
    """The dtype that row gradients are computed in: the input's, or float32 for half precision."""
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype


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
    dtype = working_dtype(x)
    out = x.new_empty(x.shape[0], *geometry.weight, dtype=dtype)
    for row, x_r, b_r in zip(out, x, b, strict=True):
        row.copy_(conv_weight_gradient(x_r.to(dtype), b_r.to(dtype), geometry))
    return out


def gather_rows(index: Tensor, values: Tensor, size: int) -> Tensor:
    """`Σ_s e_index[r, s] ⊗ values[r, s]`: index `[R, S]`, values `[R, S, D]` -> `[R, size, D]`."""
    r, _, d = values.shape
    offset = torch.arange(r, device=index.device)[:, None] * size
    out = values.new_zeros(r * size, d, dtype=working_dtype(values))
    out.index_add_(0, (index + offset).flatten(), values.to(out.dtype).flatten(0, 1))
    return out.view(r, size, d)
