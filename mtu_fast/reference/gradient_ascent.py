"""Gradient ascent on explicit gradient rows."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.reference.mean import Rows, mean


def gradient_ascent(forget: Rows) -> Tensor:
    """Direction − mean forget gradient, summed over tasks; {task: [m, P]} to [P]."""
    return -mean(forget)
