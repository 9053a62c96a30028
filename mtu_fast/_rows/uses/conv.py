"""Convolutions: activations and output gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from mtu_fast._ops._blocks import cast, working_dtype
from mtu_fast._ops._convolution import Geometry, conv_weight_gradient
from mtu_fast._ops.explicit import conv_inner, conv_rows
from mtu_fast._ops.gram import conv_cost
from mtu_fast._rows.uses.base import Use, weigh


@dataclass(frozen=True)
class Conv(Use):
    """Rows that are convolution weight gradients: x `[R, F, C, *]`, b `[R, F, O, *]`, F images a row."""

    x: Tensor
    b: Tensor
    geometry: Geometry

    @property
    def count(self) -> int:
        return self.x.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x, self.b)

    def with_tensors(self, *tensors: Tensor) -> Conv:
        x, b = tensors
        return replace(self, x=x, b=b)

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.x)

    def matrix(self) -> Tensor:
        return conv_rows(self.x, self.b, self.geometry).flatten(1)

    @property
    def unit(self) -> int:
        # of a plain kernel the weights of one output channel are columns of their own
        return prod(self.geometry.weight[1:]) if self.geometry.plain else prod(self.shape)

    def columns(self, start: int, stop: int) -> Tensor:
        # groups and transposed kernels do not have output channels first
        if not self.geometry.plain:
            return self.matrix()
        # a convolution with only these output channels
        first, last = start // self.unit, stop // self.unit
        part = replace(self.geometry, weight=(last - first, *self.geometry.weight[1:]))
        return conv_rows(self.x, self.b[:, :, first:last], part).flatten(1)

    def weighted(self, w: Tensor | None) -> Tensor:
        b = weigh(self.b, w)
        x = cast(self.x, b.dtype)
        # [R·F, …]: the sum over rows is the sum over images that a weight gradient is
        return conv_weight_gradient(x.flatten(0, 1), b.flatten(0, 1), self.geometry)

    def inner(self, d: Tensor) -> Tensor:
        return conv_inner(self.x, self.b, self.geometry, d)

    def rows_pay(self) -> bool:
        return conv_cost([self.x], [self.b], self.geometry).rows_pay
