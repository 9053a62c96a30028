"""Convolutions of any dimension, forward and transposed, grouped and depthwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtu_fast._graph.rowmap import RowMap
from mtu_fast._graph.rules.base import rule, summed
from mtu_fast._ops._convolution import Geometry
from mtu_fast._rows.uses import Conv, Use


@rule("ConvolutionBackward0", slots=(1, 2))
def convolution(
    node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap
) -> Use | None:
    """b `[M, O, *]`, input `[M, C, *]`: M images, of which a row may have several."""
    if rows.dim != 0:
        return None
    if slot == 2:
        # [M, *, O]: the channel comes last, as the bias has it
        return summed(b.flatten(2).mT, rows, shape)
    stride, padding, dilation, beyond = (
        # one may be meant for all axes (padding="valid")
        tuple(numbers) * ((len(shape) - 2) // len(numbers))
        for numbers in (
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            node._saved_output_padding,
        )
    )
    geometry = Geometry(
        shape, stride, padding, dilation, node._saved_transposed, beyond, node._saved_groups
    )
    return Conv(shape, rows.split(node._saved_input.detach(), 0), rows.split(b, 0), geometry)
