"""Fine-tuning on explicit gradient rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Rows, Sides
from mtu_fast.reference.mean import mean


def fine_tune(retain: Rows) -> Tensor:
    """Direction mean retain gradient, summed over tasks; {task: [k, P]} to [P]."""
    return mean(retain)


@dataclass(frozen=True)
class FineTune(Reference, called="fine_tune"):
    """`fine_tune` of the retain side."""

    def direction(self, sides: Sides) -> Tensor:
        return fine_tune(sides.retain)

    def outside(self, sides: Sides, task: str) -> Pair:
        return 1.0, 0.0
