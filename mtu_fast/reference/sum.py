"""The tasks' mean gradients added up, forget negated."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.reference.base import Sides, reference
from mtu_fast.reference.mean import mean


@reference("sum")
def direction(sides: Sides) -> Tensor:
    """Σ_task mean retain gradient − Σ_task mean forget gradient."""
    return mean(sides.retain) - mean(sides.forget)
