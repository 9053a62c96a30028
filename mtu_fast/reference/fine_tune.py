"""Fine-tuning on explicit gradient rows."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.reference.mean import Rows, mean


def fine_tune(retain: Rows) -> Tensor:
    """Direction mean retain gradient, summed over tasks; {task: [k, P]} to [P]."""
    return mean(retain)
