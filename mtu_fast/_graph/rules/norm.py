"""Norm layers: scale rows are `Σ b ∘ x̂`, shift rows `Σ b`, x̂ the normalised input from the saved statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtu_fast._graph.rowmap import RowMap
from mtu_fast._graph.rules.base import RULES, Shape, rule, summed
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


@RULES.entry("NativeGroupNormBackward0")
def group_norm(
    node: Any,
    wanted: Mapping[int, Shape],
    grads: Sequence[Tensor | None],
    maps: Sequence[RowMap | None],
) -> dict[int, Use]:
    """Input `[M, C, *]`, statistics `[M, groups]`; scales and shifts by one call."""
    b, rows = grads[0], maps[0]
    slots = sorted({1, 2} & wanted.keys())
    if b is None or rows is None or rows.dim != 0 or any(g is not None for g in grads[1:]):
        return {}
    if slots == [2]:
        sums = [_shifts(b)]
    else:
        statistics = node._saved_result1, node._saved_result2
        sums = _scales(b, node._saved_input.detach(), *statistics, shifts=2 in slots)
    found: dict[int, Use] = {}
    for slot, t in zip(slots, sums, strict=True):
        if (use := summed(t, rows, wanted[slot])) is not None:
            found[slot] = use
    return found


@rule("NativeBatchNormBackward0 CudnnBatchNormBackward0", slots=(1, 2))
def batch_norm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """Input `[M, C, *]`. In training the saved statistics of the batch are what the forward used."""
    if rows.dim != 0:
        return None
    if slot != 1:
        return summed(_shifts(b), rows, shape)
    mean, rstd = _statistics(node)
    # Deviations first: a mean far from 0 cancels, and running statistics may be far from the
    # batch's.
    x = node._saved_input.detach()
    x = x - mean.to(working_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))
    rstd = rstd.expand(len(b), -1)
    (sums,) = _scales(b, x, torch.zeros_like(rstd), rstd)
    return summed(sums, rows, shape)


def _statistics(node: Any) -> tuple[Tensor, Tensor]:
    """The mean and the reciprocal deviation `[C]` that a batch norm normalised by."""
    if node._saved_training:
        return node._saved_result1, node._saved_result2
    # cuDNN's node has another name for it
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    return node._saved_running_mean, (node._saved_running_var + eps).rsqrt()


def _scales(b: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, shifts: bool = False) -> list[Tensor]:
    """`(Σ b x - mean Σ b) · rstd` over the positions of each image and channel `[M, C]`, b and x `[M, C, *]`.

    And, with `shifts`, `Σ b`.
    """
    dtype, images, channels = working_dtype(b), b.shape[0], b.shape[1]
    every = images * channels
    # Torch's own backward does it without a temporary, image by image if every image has channels
    # of its own: M images of C channels as one of M · C. It reads all as contiguous memory,
    # whatever the strides.
    b, x = (t.to(dtype).reshape(1, every, -1).contiguous() for t in (b, x))
    mean, rstd = (t.to(dtype).reshape(1, -1).contiguous() for t in (mean, rstd))
    pixels, groups = b.shape[2], mean.shape[1]
    weight = b.flatten()[:every]  # of which gradients of weights want no more than the size
    found = torch.ops.aten.native_group_norm_backward(
        b, x, mean, rstd, weight, 1, every, pixels, groups, (False, True, shifts)
    )
    return [t.view(images, channels) for t in found[1 : 3 if shifts else 2]]


def _shifts(b: Tensor) -> Tensor:
    """`Σ b` over the positions of each image and channel `[M, C]`, b `[M, C, *]`."""
    return b.flatten(2).sum(2, dtype=working_dtype(b)) if b.dim() > 2 else b
