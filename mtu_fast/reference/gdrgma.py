"""GDR-GMA on explicit gradient vectors."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Sides
from mtu_fast.reference.mean import mean


def gdrgma(r: Tensor, f: Tensor, share: float) -> Tensor:
    """(1 − share) r' + share f': r' is r without its conflict with f, f' is f − <r, f> / ‖r‖² · r' ([P] each).

    Source: GDR-GMA, ACM Multimedia 2024; the order and the r' in the second step as in its code.
    """
    conflict = r @ f
    if conflict < 0:
        # r' ⊥ f
        rectified = r - conflict / (f @ f) * f
        f = f - conflict / (r @ r) * rectified
        r = rectified
    return (1 - share) * r + share * f


def forget_share(sides: Sides, slope: float, threshold: float) -> float:
    """1 / (1 + exp(slope (L − threshold))), L the mean over tasks of the mean retain loss; 0 without any."""
    means = [float(loss.mean()) for loss in sides.retain_loss.values() if len(loss)]
    loss = sum(means) / max(len(means), 1)
    # the exponent is cut where exp would overflow; the share is 0 to rounding there
    return 1 / (1 + exp(min(slope * (loss - threshold), 700.0)))


@dataclass(frozen=True)
class GDRGMA(Reference, called="gdrgma"):
    """`gdrgma` of the summed mean retain gradients and the negated forget ones."""

    slope: float = 100.0
    threshold: float = 0.02

    def direction(self, sides: Sides) -> Tensor:
        share = forget_share(sides, self.slope, self.threshold)
        return gdrgma(mean(sides.retain), -mean(sides.forget), share)

    def outside(self, sides: Sides, task: str) -> Pair:
        share = forget_share(sides, self.slope, self.threshold)
        return 1 - share, share
