"""The tasks' mean gradients added up, forget negated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.reference.base import Reference, Sides
from mtu_fast.reference.mean import mean


@dataclass(frozen=True)
class Sum(Reference, called="sum"):
    """Σ_task mean retain gradient − Σ_task mean forget gradient."""

    def direction(self, sides: Sides) -> Tensor:
        return mean(sides.retain) - mean(sides.forget)
