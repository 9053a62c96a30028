"""Rows of a convolution as a Gram needs them: in any order of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from mtu_fast._ops._arguments import check_images
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops._convolution import Geometry, plain_rows
from mtu_fast._ops._library import define
from mtu_fast._ops._pixels import WALK


@define(
    f"unordered_rows(Tensor[] x, Tensor[] b, {WALK}, str precision) -> Tensor[]", check=check_images
)
def unordered_rows(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str,
) -> list[Tensor]:  # fmt: skip
    """Weight gradients row by row, of one group: x `[R_i, F, C, *]`, b `[R_i, F, O, *]` -> `[R_i, O · C · taps]` each.

    Columns have one order in all blocks, the implementation's own.
    """
    weight = (b[0].shape[2], x[0].shape[2], *kernel)
    none = (0,) * len(kernel)
    geometry = Geometry(weight, tuple(stride), tuple(padding), tuple(dilation), False, none, 1)
    return [plain_rows(x_i, b_i, geometry).flatten(1) for x_i, b_i in zip(x, b, strict=True)]


@unordered_rows.fake
def _(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str,
) -> list[Tensor]:  # fmt: skip
    columns = b[0].shape[2] * x[0].shape[2] * prod(kernel)
    dtypes = [
        torch.promote_types(working_dtype(x_i), working_dtype(b_i))
        for x_i, b_i in zip(x, b, strict=True)
    ]
    return [
        x_i.new_empty(len(x_i), columns, dtype=dtype) for x_i, dtype in zip(x, dtypes, strict=True)
    ]


unordered_rows.triton("rows")
