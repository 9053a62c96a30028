"""Distances between what two models say of the same samples; the retrained model is the usual other."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast._arguments import check_tensors


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_c p_c (ln p_c - ln q_c) per sample, the mean over its pixels; 0 where the models agree.

    Args:
        reference: [N, C, ...] logits of p, usually of the retrained model.
        logits: [N, C, ...] logits of q, usually of the unlearned model.

    Returns:
        [N] float64, in nats, >= 0; N = 0 is allowed.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes that differ or lack a class dimension of at least two, or logits that are
            not finite.
    """
    _check("kl_divergence", reference, logits)
    if logits.shape[1] < 2:
        raise ValueError(
            f"kl_divergence: found {tuple(logits.shape)}, expected at least two classes in dimension 1."
        )
    log_p = reference.detach().double().log_softmax(1)
    log_q = logits.detach().double().log_softmax(1)
    per_pixel = (log_p.exp() * (log_p - log_q)).sum(1).clamp(min=0.0)  # rounding alone is below
    # without pixels [N] becomes [N, 1], so that there is something to average
    return per_pixel.unsqueeze(-1).flatten(1).mean(1)


def logit_distance(reference: Tensor, logits: Tensor) -> Tensor:
    """‖z_p - z_q‖₂ over the channels, per sample, the mean over its pixels.

    It also serves outputs that are no logits: the absolute difference of two depth maps, for example (C =
    1).

    Args:
        reference: [N, C, ...] outputs of one model.
        logits: [N, C, ...] outputs of the other.

    Returns:
        [N] float64, >= 0; N = 0 is allowed.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes that differ or lack a channel dimension, or outputs that are not finite.
    """
    _check("logit_distance", reference, logits)
    distance = (reference.detach().double() - logits.detach().double()).square().sum(1).sqrt()
    return distance.unsqueeze(-1).flatten(1).mean(1)


def _check(name: str, a: Tensor, b: Tensor) -> None:
    check_tensors(reference=a, logits=b)
    if a.dim() < 2 or a.shape != b.shape:
        raise ValueError(
            f"{name}: reference and logits: found shapes {tuple(a.shape)} and {tuple(b.shape)}, expected "
            "[N, C, ...] both."
        )
    for z in (a, b):
        bad = (~torch.isfinite(z.detach()).flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name}: the outputs for samples {bad[:8]} are not finite; the distance would not be."
            )
