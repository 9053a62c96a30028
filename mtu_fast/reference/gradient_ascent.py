"""Gradient ascent on explicit gradient rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Rows, Sides
from mtu_fast.reference.mean import mean


def gradient_ascent(forget: Rows) -> Tensor:
    """Direction − mean forget gradient, summed over tasks; {task: [m, P]} to [P]."""
    return -mean(forget)


@dataclass(frozen=True)
class GradientAscent(Reference, called="ascent"):
    """`gradient_ascent` of the forget side; `alpha`, that of GradDiff, makes no difference."""

    alpha: float = 0.0

    def direction(self, sides: Sides) -> Tensor:
        return gradient_ascent(sides.forget)

    def outside(self, sides: Sides, task: str) -> Pair:
        return 0.0, 1.0
