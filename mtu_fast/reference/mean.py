"""The plain mean of explicit gradient rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Rows = Mapping[str, Tensor]


def mean(rows: Rows) -> Tensor:
    """Σ_task mean of the task's rows: {task: [n, P]} -> [P]; a task without rows adds nothing."""
    parts = [g.mean(0) if len(g) else g.sum(0) for g in rows.values()]
    return torch.stack(parts).sum(0)
