"""What one run is judged by: scores, membership inference, and the drift of what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import Dataset
from benchmarks.protocol import REPORTED, Problem, judge, sample_losses, table
from mtu_fast.unlearning import metrics


def compare(
    problem: Problem, parts: Mapping[str, Dataset], targets: tuple[str, ...], original: nn.Module, model: nn.Module,
    retrained: nn.Module, removal: str = "instance",
) -> dict[str, Any]:  # fmt: skip
    """Every score of one model, as one flat row with the score tables beside.

    Membership is told from `parts["held_out"]`, or the test data where there is none.
    """
    o, u, r = (table(problem, net, parts) for net in (original, model, retrained))
    scores = judge(o, u, r, targets, removal)
    gaps = {f"gap_{split}": _mean(scores["gaps"][split].values()) for split in REPORTED}
    before, after = (
        {s: sample_losses(problem, net, parts[s]) for s in REPORTED} for net in (original, model)
    )
    rise = kept_rise(before, after, targets)
    if "held_out" in parts:
        after["test"] = sample_losses(problem, model, parts["held_out"])
    return {
        "uis": scores["uis"], "gap": scores["mean_gap"], **gaps, "tow": scores["tow"],
        "auc": attack(after, targets), "drift": rise.mean().item(),
        "drift_99": torch.quantile(rise, 0.99).item(),
        "shift": metrics.parameter_shift(original.parameters(), model.parameters()),
        "over_forgotten": list(scores["over_forgotten"]), "scores": u,
    }  # fmt: skip


def attack(losses: Mapping[str, Mapping[str, Tensor]], targets: tuple[str, ...]) -> float:
    """Mean over target tasks of the AUC with which `metrics.membership` tells F from test data; 0.5 is chance."""
    return _mean(
        metrics.membership(losses["forget"][task], losses["test"][task]).auc for task in targets
    )


def kept_rise(
    before: Mapping[str, Mapping[str, Tensor]],
    after: Mapping[str, Mapping[str, Tensor]],
    targets: tuple[str, ...],
) -> Tensor:
    """By how much the loss of each (sample, task) pair to keep rose: the retain data, and F in tasks not targeted."""
    pairs = [("retain", task) for task in before["retain"]]
    pairs += [("forget", task) for task in before["forget"] if task not in targets]
    return torch.cat([(after[split][task] - before[split][task]).double() for split, task in pairs])


def _mean(values: Any) -> float:
    found = list(values)
    return float(sum(found) / len(found))
