"""The plain mean of explicit gradient rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Rows, Sides, reference


def mean(rows: Rows) -> Tensor:
    """Σ_task mean of the task's rows: {task: [n, P]} -> [P]; a task without rows adds nothing."""
    parts = [g.mean(0) if len(g) else g.sum(0) for g in rows.values()]
    return torch.stack(parts).sum(0)


def _shares(sides: Sides, task: str, **_: Any) -> Pair:
    """The mean over all rows of the task, written as two means."""
    k, m = len(sides.retain[task]), len(sides.forget[task])
    return k / max(k + m, 1), -m / max(k + m, 1)


@reference("mean", outside=_shares)
def direction(sides: Sides) -> Tensor:
    """`mean` of retain and forget rows together."""
    return mean({
        task: torch.cat([sides.retain[task], sides.forget[task]]) for task in sides.retain
    })
