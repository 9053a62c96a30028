"""Norm layers: scale rows are `Σ b ∘ x̂`, shift rows `Σ b`, x̂ the normalised input from the saved statistics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtu_fast.rowmap import RowMap
from mtu_fast.rules.base import rule, summed
from mtu_fast.uses import Use


@rule("NativeLayerNormBackward0")
def layer_norm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """Input `[…, *normalized_shape]`; the parameters broadcast from the right."""
    if slot == 1:
        b = b * ((node._saved_input.detach() - node._saved_result1) * node._saved_result2)
    return summed(b, rows, shape)


@rule("FusedRmsNormBackward0")
def rms_norm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """`out = x · rstd · weight`; the weight broadcasts from the right."""
    return summed(b * (node._saved_input.detach() * node._saved_result1), rows, shape)


@rule("NativeGroupNormBackward0")
def group_norm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """Input `[M, C, *]`, statistics `[M, groups]`."""
    if slot == 1:
        x = node._saved_input.detach()
        grouped = x.reshape(x.shape[0], node._saved_group, -1)
        normalised = (grouped - node._saved_result1[..., None]) * node._saved_result2[..., None]
        b = b * normalised.view_as(x)
    return _per_channel(b, shape, rows)


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0")
def batch_norm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """Input `[M, C, *]`. In training the saved statistics of the batch are what the forward used."""
    if slot == 1:
        x = node._saved_input.detach()
        if node._saved_training:
            mean, rstd = node._saved_result1, node._saved_result2
        else:
            eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
            mean, rstd = node._saved_running_mean, (node._saved_running_var + eps).rsqrt()
        over = [1, -1] + [1] * (x.dim() - 2)
        b = b * ((x - mean.view(over)) * rstd.view(over))
    return _per_channel(b, shape, rows)


def _per_channel(b: Tensor, shape: tuple[int, ...], rows: RowMap) -> Use | None:
    """`[M, C, *]` with one parameter a channel: bring the channel to the right."""
    if rows.dim != 0:
        return None
    return summed(b.flatten(2).mT if b.dim() > 2 else b, rows, shape)
