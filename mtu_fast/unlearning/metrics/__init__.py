"""Scores of unlearning, and of the tasks they are made from."""

from __future__ import annotations

from mtu_fast.unlearning.metrics.dense import (
    depth_loss,
    depth_scores,
    normal_loss,
    normal_scores,
    pixel_accuracy,
    present,
    segmentation_loss,
    valid_pixels,
)
from mtu_fast.unlearning.metrics.distance import kl_divergence, logit_distance
from mtu_fast.unlearning.metrics.drift import QUANTILES, Drift, drift
from mtu_fast.unlearning.metrics.membership import Membership, entropy, membership
from mtu_fast.unlearning.metrics.relearn import relearn_steps
from mtu_fast.unlearning.metrics.tables import (
    Scores,
    gaps,
    mean_gap,
    over_forgotten,
    parameter_shift,
    tow,
    uis,
)
from mtu_fast.unlearning.metrics.tasks import mean_iou, top1
from mtu_fast.unlearning.metrics.text import rouge_l, truth_ratio

__all__ = [
    "QUANTILES",
    "Drift",
    "Membership",
    "Scores",
    "depth_loss",
    "depth_scores",
    "drift",
    "entropy",
    "gaps",
    "kl_divergence",
    "logit_distance",
    "mean_gap",
    "mean_iou",
    "membership",
    "normal_loss",
    "normal_scores",
    "over_forgotten",
    "parameter_shift",
    "pixel_accuracy",
    "present",
    "relearn_steps",
    "rouge_l",
    "segmentation_loss",
    "top1",
    "tow",
    "truth_ratio",
    "uis",
    "valid_pixels",
]
