"""The plain mean of explicit gradient rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Rows, Sides


def mean(rows: Rows) -> Tensor:
    """Σ_task mean of the task's rows: {task: [n, P]} -> [P]; a task without rows adds nothing."""
    parts = [g.mean(0) if len(g) else g.sum(0) for g in rows.values()]
    return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class Mean(Reference, called="mean"):
    """`mean` of retain and forget rows together."""

    def direction(self, sides: Sides) -> Tensor:
        return mean({
            task: torch.cat([sides.retain[task], sides.forget[task]]) for task in sides.retain
        })

    def outside(self, sides: Sides, task: str) -> Pair:
        k, m = len(sides.retain[task]), len(sides.forget[task])
        return k / max(k + m, 1), -m / max(k + m, 1)  # the mean over all rows, as two means
