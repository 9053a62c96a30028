"""Convolutions of any dimension, forward and transposed, grouped and depthwise."""

from __future__ import annotations

from collections.abc import Sequence
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
    # [N, S, C, *]: S images of each row
    images = rows.split(node._saved_input.detach(), 0)
    return Conv(shape, images, rows.split(b, 0), _geometry(node, shape))


def _geometry(node: Any, shape: tuple[int, ...]) -> Geometry:
    """How the kernel of this shape moves over the images."""
    axes = len(shape) - 2
    return Geometry(
        shape,
        _along(node._saved_stride, axes),
        _along(node._saved_padding, axes),
        _along(node._saved_dilation, axes),
        node._saved_transposed,
        _along(node._saved_output_padding, axes),
        node._saved_groups,
    )


def _along(numbers: Sequence[int], axes: int) -> tuple[int, ...]:
    """A number for every axis; one may be meant for all (padding="valid")."""
    return tuple(numbers) * (axes // len(numbers))
