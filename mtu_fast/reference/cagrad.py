"""CAGrad on explicit gradient vectors, by bisection over the gain of the worst task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Sides, even
from mtu_fast.reference.dualproj import nearest


def cagrad(gradients: Tensor, c: float = 0.5) -> Tensor:
    """The d in ‖d − g_0‖ ≤ c ‖g_0‖ with the largest min_i ⟨g_i, d⟩, the nearest to g_0 where there are several.

    g_0 is the mean gradient. The worst gain is bisected: it can be had where the nearest d to g_0
    that has it is in the ball.

    Args:
        gradients: [R, P], one gradient per task; a gradient to be ascended is negated by the
            caller.
        c: radius of the ball.

    Returns:
        The update direction [P].

    Source: arXiv 2110.14048, equation 3.
    """
    if not len(gradients):
        return gradients.sum(0)
    mean = gradients.mean(0)
    radius = c * float(mean.norm())
    low = float((gradients @ mean).min())  # the mean itself has it
    # ⟨g_i, d⟩ ≤ ⟨g_i, g_0⟩ + ‖g_i‖ ‖d − g_0‖
    high = low + radius * float(gradients.norm(dim=1).max())
    best = mean
    # 2⁻⁶⁰ of the first bracket is below rounding
    for _halving in range(60):
        # low can be had and high cannot
        middle = (low + high) / 2
        d = nearest(gradients, mean, middle)
        if d is not None and float(torch.dist(d, mean)) <= radius:
            low, best = middle, d
        else:
            high = middle
    return best


@dataclass(frozen=True)
class CAGrad(Reference, called="cagrad"):
    """`cagrad` of the signed mean rows."""

    c: float = 0.5

    def direction(self, sides: Sides) -> Tensor:
        return cagrad(sides.signed_matrix(), self.c)

    def outside(self, sides: Sides, task: str) -> Pair:
        return even(sides)
