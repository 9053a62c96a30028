"""Gradient ascent on explicit gradient rows."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.reference.base import Rows, Sides, reference
from mtu_fast.reference.mean import mean


def gradient_ascent(forget: Rows) -> Tensor:
    """Direction − mean forget gradient, summed over tasks; {task: [m, P]} to [P]."""
    return -mean(forget)


@reference("ascent", outside=(0.0, 1.0))
def direction(sides: Sides, alpha: float = 0.0) -> Tensor:
    """`gradient_ascent` of the forget side; `alpha`, that of GradDiff, makes no difference."""
    return gradient_ascent(sides.forget)
