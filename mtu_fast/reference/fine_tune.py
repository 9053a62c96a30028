"""Fine-tuning on explicit gradient rows."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.reference.base import Rows, Sides, reference
from mtu_fast.reference.mean import mean


def fine_tune(retain: Rows) -> Tensor:
    """Direction mean retain gradient, summed over tasks; {task: [k, P]} to [P]."""
    return mean(retain)


@reference("fine_tune", outside=(1.0, 0.0))
def direction(sides: Sides) -> Tensor:
    """`fine_tune` of the retain side."""
    return fine_tune(sides.retain)
