"""Scores of unlearning, and of the tasks they are made from."""

from __future__ import annotations

from mtu_fast.metrics.tables import Scores, gaps, mean_gap, over_forgotten, parameter_shift, tow, uis
from mtu_fast.metrics.tasks import mean_iou, top1

__all__ = ["Scores", "gaps", "mean_gap", "mean_iou", "over_forgotten", "parameter_shift", "top1", "tow", "uis"]
