"""Gradient difference on explicit gradient rows."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.reference.base import Rows, Sides, reference
from mtu_fast.reference.mean import mean


def graddiff(retain: Rows, forget: Rows, alpha: float = 0.5) -> Tensor:
    """Direction alpha · mean retain gradient − (1 − alpha) · mean forget gradient; {task: [n, P]} twice to [P].

    Source: arXiv 2203.12817; alpha = 0 is gradient ascent.
    """
    return alpha * mean(retain) - (1.0 - alpha) * mean(forget)


@reference("graddiff", outside=lambda sides, task, alpha: (alpha, 1.0 - alpha))
def direction(sides: Sides, alpha: float = 0.5) -> Tensor:
    """`graddiff` of the two sides."""
    return graddiff(sides.retain, sides.forget, alpha)
