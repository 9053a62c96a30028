"""Training on random labels, on explicit gradient rows."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.reference.base import Rows, Sides, reference
from mtu_fast.reference.mean import mean


def random_labels(retain: Rows, forget: Rows, alpha: float = 0.5) -> Tensor:
    """Direction alpha · mean retain gradient + (1 − alpha) · mean forget gradient; {task: [n, P]} twice to [P].

    The forget rows are gradients of losses on wrong labels.
    """
    return alpha * mean(retain) + (1.0 - alpha) * mean(forget)


@reference("random_labels", outside=lambda sides, task, alpha: (alpha, alpha - 1.0))
def direction(sides: Sides, alpha: float = 0.5) -> Tensor:
    """`random_labels` of the two sides."""
    return random_labels(sides.retain, sides.forget, alpha)
