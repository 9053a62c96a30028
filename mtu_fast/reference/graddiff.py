"""Gradient difference on explicit gradient rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Rows, Sides
from mtu_fast.reference.mean import mean


def graddiff(retain: Rows, forget: Rows, alpha: float = 0.5) -> Tensor:
    """Direction alpha · mean retain gradient − (1 − alpha) · mean forget gradient; {task: [n, P]} twice to [P].

    Source: arXiv 2203.12817; alpha = 0 is gradient ascent.
    """
    return alpha * mean(retain) - (1.0 - alpha) * mean(forget)


@dataclass(frozen=True)
class GradDiff(Reference, called="graddiff"):
    """`graddiff` of the two sides."""

    alpha: float = 0.5

    def direction(self, sides: Sides) -> Tensor:
        return graddiff(sides.retain, sides.forget, self.alpha)

    def outside(self, sides: Sides, task: str) -> Pair:
        return self.alpha, 1.0 - self.alpha
