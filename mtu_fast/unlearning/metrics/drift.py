"""Drift: how the losses of single samples moved, which a mean over the data hides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Drift:
    """The distribution of `Δ_i = loss_after(i) - loss_before(i)` over N samples; a rise is damage.

    Attributes:
        samples: N.
        mean: mean of Δ.
        quantiles: Δ at `QUANTILES` (1, 5, 25, 50, 75, 95, 99 %), linear between order statistics.
        worst_mean: mean of the largest 1 % of Δ, of one sample at least.
        worst: (index, Δ) of the samples that rose most, the worst first.
        worst_class: (class, mean Δ in it) where that mean is largest; None without labels.
    """

    samples: int
    mean: float
    quantiles: tuple[float, ...]
    worst_mean: float
    worst: tuple[tuple[int, float], ...]
    worst_class: tuple[int, float] | None


def drift(before: Tensor, after: Tensor, labels: Tensor | None = None, *, worst: int = 5) -> Drift:
    """Mean, quantiles and worst cases of `Δ = after - before`, the change of each sample's loss.

    Args:
        before: [N] losses of the samples under the original model.
        after: [N] losses of the same samples under the unlearned model.
        labels: [N] class of each sample (an integer tensor), if there is one.
        worst: how many of the worst samples to name; of equal ones the first.

    Returns:
        The distribution, in the losses' unit.

    Raises:
        ValueError: shapes that differ, N = 0, or a loss that is not finite.
    """
    if before.dim() != 1 or before.shape != after.shape or not len(before):
        raise ValueError(
            f"drift: before has shape {tuple(before.shape)} and after {tuple(after.shape)}, expected [N] both, the "
            "losses of the same N > 0 samples in the same order."
        )
    change = after.detach().double() - before.detach().double()
    bad = (~torch.isfinite(change)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"drift: the losses of samples {bad[:8]} are not finite, expected finite ones."
        )
    order = change.argsort(descending=True, stable=True)
    ranked = change[order]
    at = torch.tensor(QUANTILES, dtype=torch.float64, device=change.device)
    tail = math.ceil(len(change) / 100)
    return Drift(
        samples=len(change),
        mean=change.mean().item(),
        quantiles=tuple(_quantile(ranked.flip(0), at).tolist()),
        worst_mean=ranked[:tail].mean().item(),
        worst=tuple(zip(order[:worst].tolist(), ranked[:worst].tolist(), strict=True)),
        worst_class=None if labels is None else _worst_class(change, labels),
    )


def _quantile(ascending: Tensor, at: Tensor) -> Tensor:
    """As `torch.quantile`, which refuses more than 16 million values."""
    place = at * (len(ascending) - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(ascending) - 1)
    return ascending[low].lerp(ascending[high], place - low)


def _worst_class(change: Tensor, labels: Tensor) -> tuple[int, float]:
    if labels.shape != change.shape or labels.is_floating_point():
        raise ValueError(
            f"drift: labels are {labels.dtype} {tuple(labels.shape)}, expected integers [{len(change)}], a class per "
            "sample; dense tasks have none."
        )
    classes, member = labels.to(change.device).unique(return_inverse=True)
    total = change.new_zeros(len(classes)).index_add(0, member, change)
    means = total / torch.bincount(member, minlength=len(classes))
    top = int(means.argmax())
    return int(classes[top]), means[top].item()
