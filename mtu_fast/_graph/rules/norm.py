"""Norm layers: scale rows are `Σ b ∘ x̂`, shift rows `Σ b`, x̂ the normalised input from the saved statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtu_fast._graph.rowmap import RowMap
from mtu_fast._graph.rules.base import rule, summed
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._rows.uses import Use


@rule("NativeLayerNormBackward0", slots=(1, 2))
def layer_norm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """Input `[…, *normalized_shape]`; the parameters broadcast from the right."""
    if slot == 1:
        mean, rstd = node._saved_result1, node._saved_result2
        b = b * ((node._saved_input.detach() - mean) * rstd)
    return summed(b, rows, shape)


@rule("FusedRmsNormBackward0", slots=(1,))
def rms_norm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """`out = x · rstd · weight`; the weight broadcasts from the right."""
    normalised = node._saved_input.detach() * node._saved_result1
    return summed(b * normalised, rows, shape)


@rule("NativeGroupNormBackward0", slots=(1, 2))
def group_norm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """Input `[M, C, *]`, statistics `[M, groups]`."""
    if slot != 1:
        return _shifts(b, shape, rows)
    mean, rstd = node._saved_result1, node._saved_result2
    return _scales(b, node._saved_input.detach(), mean, rstd, shape, rows)


@rule("NativeBatchNormBackward0 CudnnBatchNormBackward0", slots=(1, 2))
def batch_norm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """Input `[M, C, *]`. In training the saved statistics of the batch are what the forward used."""
    if slot != 1:
        return _shifts(b, shape, rows)
    mean, rstd = _statistics(node)
    # Deviations first: a mean far from 0 cancels, and running statistics may be far from the
    # batch's.
    x = node._saved_input.detach()
    x = x - mean.to(working_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))
    rstd = rstd.expand(len(b), -1)
    return _scales(b, x, torch.zeros_like(rstd), rstd, shape, rows)


def _statistics(node: Any) -> tuple[Tensor, Tensor]:
    """The mean and the reciprocal deviation `[C]` that a batch norm normalised by."""
    if node._saved_training:
        return node._saved_result1, node._saved_result2
    # cuDNN's node has another name for it
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    return node._saved_running_mean, (node._saved_running_var + eps).rsqrt()


def _scales(
    b: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, shape: tuple[int, ...], rows: RowMap
) -> Use | None:
    """`(Σ b x - mean Σ b) · rstd` over the positions of each image and channel, b and x `[M, C, *]`."""
    if rows.dim != 0:
        return None
    dtype, channels = working_dtype(b), b.shape[0] * b.shape[1]
    # Torch's own backward does it without a temporary, image by image if every image has channels
    # of its own: M images of C channels as one of M · C. It reads all as contiguous memory,
    # whatever the strides.
    b, x = (t.to(dtype).reshape(1, channels, -1).contiguous() for t in (b, x))
    mean, rstd = (t.to(dtype).reshape(1, -1).contiguous() for t in (mean, rstd))
    weight, pixels, groups = b.new_ones(channels), b.shape[2], mean.shape[1]
    only_of_weight = (False, True, False)
    _, sums, _ = torch.ops.aten.native_group_norm_backward(
        b, x, mean, rstd, weight, 1, channels, pixels, groups, only_of_weight
    )
    return summed(sums.view(-1, *shape), rows, shape)


def _shifts(b: Tensor, shape: tuple[int, ...], rows: RowMap) -> Use | None:
    """`Σ b` over the positions of each image and channel, b `[M, C, *]`."""
    if rows.dim != 0:
        return None
    if b.dim() > 2:
        b = b.flatten(2).sum(2, dtype=working_dtype(b))
    return summed(b, rows, shape)
