"""Histograms of how the losses of single samples changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtu_fast.unlearning.report.split import Split

BINS = 41
ENDS = (0.005, 0.995)  # quantiles that the axis covers


def histograms(splits: Mapping[str, Split]) -> dict[str, Any]:
    """{split: {task: {edges, counts: {model: [...]}}}} of loss changes; the end bins hold all that lies beyond."""
    found: dict[str, Any] = {}
    for name, split in splits.items():
        found[name] = {}
        for task, there in split.labelled.items():
            found[name][task] = _histogram(_changes(split, task)) if there else None
    return found


def _changes(split: Split, task: str) -> dict[str, Tensor]:
    before = split.losses["original"][task]
    return {model: split.losses[model][task] - before for model in split.others}


def _histogram(changes: Mapping[str, Tensor]) -> dict[str, Any]:
    low, high = _range(changes)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    counts = {}
    for model, change in changes.items():
        # what lies beyond the ends is counted in the outer bins
        place = ((change - low) / (high - low) * BINS).floor()
        bins = place.clamp(0, BINS - 1).long()
        counts[model] = torch.bincount(bins, minlength=BINS).tolist()
    return {"edges": edges.tolist(), "counts": counts}


def _range(changes: Mapping[str, Tensor]) -> tuple[float, float]:
    """From the lowest to the highest change of all models, 0 included, without outliers."""
    ends = [0.0]
    for change in changes.values():
        ranked = change.sort().values
        for quantile in ENDS:
            ends.append(float(ranked[round(quantile * (len(change) - 1))]))
    low, high = min(ends), max(ends)
    if high - low < 1e-9:
        return -0.5, 0.5
    return low, high
