"""Rows of convolutions whose groups have few channels, depthwise ones above all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtu_fast._ops._arguments import check_groups, check_images, check_numbers
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops._convolution import Geometry, plain_rows
from mtu_fast._ops._library import define


def _check(
    x: Tensor, b: Tensor, groups: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> None:  # fmt: skip
    check_numbers("x", x)
    check_numbers("b", b)
    check_images([x], [b], kernel, stride, padding, dilation, "highest")
    check_groups(groups, x.shape[2], b.shape[2])


@define(
    "grouped_rows(Tensor x, Tensor b, int groups, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
    check=_check,
)
def grouped_rows(
    x: Tensor, b: Tensor, groups: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """`rows[r, o, c, δ] = Σ_{f, p} x[r, f, c of o's group, p + δ] · b[r, f, o, p]`: weight gradients row by row.

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
        TypeError: tensors that are not of real floating dtypes.
        ValueError: sizes that do not belong together.
    """
    weight, none = (b.shape[2], x.shape[2] // groups, *kernel), (0,) * len(kernel)
    return plain_rows(
        x, b, Geometry(weight, tuple(stride), tuple(padding), tuple(dilation), False, none, groups)
    )


@grouped_rows.fake
def _(
    x: Tensor, b: Tensor, groups: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    dtype = torch.promote_types(working_dtype(x), working_dtype(b))
    return x.new_empty(x.shape[0], b.shape[2], x.shape[2] // groups, *kernel, dtype=dtype)


grouped_rows.triton("rows")
