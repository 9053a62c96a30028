"""Drift: how the losses of single samples moved, which a mean over the data hides."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtu_fast._arguments import check_dense, check_tensors, check_whole, shown

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
    worst_class: tuple[Hashable, float] | None


def drift(
    before: Tensor,
    after: Tensor,
    labels: Tensor | Sequence[Hashable] | None = None,
    *,
    worst: int = 5,
) -> Drift:
    """Mean, quantiles and worst cases of `Δ = after - before`, the change of each sample's loss.

    Args:
        before: [N] losses of the samples under the original model.
        after: [N] losses of the same samples under the unlearned model.
        labels: [N] class of each sample, if there is one: integers or booleans as a tensor, or a list of
            anything, for example names.
        worst: how many of the worst samples to name; of equal ones the first.

    Returns:
        The distribution, in the losses' unit.

    Raises:
        TypeError: losses that are no tensors, or labels that cannot be told apart.
        ValueError: shapes that differ, N = 0, or a loss that is not finite.
    """
    check_tensors(before=before, after=after)
    check_whole("drift: worst", worst, 0)
    if before.dim() != 1 or before.shape != after.shape or not len(before):
        raise ValueError(
            f"drift: before has shape {tuple(before.shape)} and after {tuple(after.shape)}, expected [N] both, the "
            "losses of the same N > 0 samples in the same order."
        )
    change = after.detach().double() - before.detach().double()
    bad = (~torch.isfinite(change)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"drift: before and after: the losses of samples {bad[:8]} are not finite, expected finite ones."
        )
    # stable, so that equal changes stay in the order of the data
    order = change.argsort(descending=True, stable=True)
    ranked = change[order]
    at = torch.tensor(QUANTILES, dtype=torch.float64, device=change.device)
    # 1 %, and never none
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


def _worst_class(change: Tensor, labels: Tensor | Sequence[Hashable]) -> tuple[Hashable, float]:
    names, member = _classes(labels, len(change))
    # on the host, where sums have one order
    member, change = member.cpu(), change.cpu()
    total = change.new_zeros(len(names)).index_add(0, member, change)
    means = total / torch.bincount(member, minlength=len(names))
    top = int(means.argmax())
    return names[top], means[top].item()


def _classes(labels: Tensor | Sequence[Hashable], samples: int) -> tuple[list[Hashable], Tensor]:
    """The classes there are, and which of them each sample is of, [N]."""
    if isinstance(labels, Tensor):
        check_dense("drift: labels", labels)
        if labels.shape != (samples,) or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"drift: labels are {labels.dtype} {tuple(labels.shape)}, expected integers [{samples}], a class per "
                "sample; dense tasks have none."
            )
        classes, member = labels.long().unique(return_inverse=True)
        return classes.tolist(), member
    if not isinstance(labels, Sequence | np.ndarray):
        raise TypeError(
            f"drift: labels: found {shown(labels)}, expected a tensor or a list of classes."
        )
    if len(labels) != samples:
        raise ValueError(
            f"drift: found {len(labels)} labels, expected {samples}, a class per sample."
        )
    known: dict[Hashable, int] = {}
    try:
        member = [known.setdefault(_plain(label), len(known)) for label in labels]
    except Exception as error:  # of the caller's own class, in a comparison say
        raise TypeError(
            f"drift: labels: {error}, expected values that can be hashed: numbers, names, tuples."
        ) from error
    return list(known), torch.tensor(member)


def _plain(label: Any) -> Hashable:
    """A label that equals another of the same class, as tensors of one number do not."""
    return label.item() if hasattr(label, "item") else label
