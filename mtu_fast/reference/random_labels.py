"""Training on random labels, on explicit gradient rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Rows, Sides
from mtu_fast.reference.mean import mean


def random_labels(retain: Rows, forget: Rows, alpha: float = 0.5) -> Tensor:
    """Direction alpha · mean retain gradient + (1 − alpha) · mean forget gradient; {task: [n, P]} twice to [P].

    The forget rows are gradients of losses on wrong labels.
    """
    return alpha * mean(retain) + (1.0 - alpha) * mean(forget)


@dataclass(frozen=True)
class RandomLabels(Reference, called="random_labels"):
    """`random_labels` of the two sides."""

    alpha: float = 0.5

    def direction(self, sides: Sides) -> Tensor:
        return random_labels(sides.retain, sides.forget, self.alpha)

    def outside(self, sides: Sides, task: str) -> Pair:
        return self.alpha, self.alpha - 1.0
