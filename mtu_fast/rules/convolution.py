"""Convolutions of any dimension, forward and transposed, grouped and depthwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtu_fast.ops.explicit import Geometry
from mtu_fast.rowmap import RowMap
from mtu_fast.rules.base import rule, summed
from mtu_fast.uses import Conv, Use


@rule("ConvolutionBackward0")
def convolution(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """b `[M, O, *]`, input `[M, C, *]`: M images, of which a row may have several."""
    if rows.dim != 0:
        return None
    if slot == 2:
        return summed(b.flatten(2).mT, rows, shape)  # [M, *, O]: the channel comes last, as the bias has it
    geometry = Geometry(
        shape, tuple(node._saved_stride), tuple(node._saved_padding), tuple(node._saved_dilation),
        node._saved_transposed, tuple(node._saved_output_padding), node._saved_groups,
    )  # fmt: skip
    return Conv(shape, rows.split(node._saved_input.detach(), 0), rows.split(b, 0), geometry)
