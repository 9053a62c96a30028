"""The numbers of an audit from what was measured: attack, drift and distances."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtu_fast._arguments import shown
from mtu_fast.unlearning.metrics import drift, membership
from mtu_fast.unlearning.metrics.drift import QUANTILES
from mtu_fast.unlearning.report.comparisons import note
from mtu_fast.unlearning.report.split import Split


def attacks(splits: Mapping[str, Split], seed: int, notes: list[str]) -> dict[str, Any]:
    """Membership inference, forget against test: {model: {task: {loss, entropy}}}; None where it failed."""
    forget, test = splits["forget"], splits["test"]
    found = {}
    for model in forget.losses:
        of_model: dict[str, Any] = {}
        for by in ("loss", "entropy"):
            one, other = forget.values(by)[model], test.values(by)[model]
            for task, values in one.items():
                kinds = of_model.setdefault(task, {})
                kinds[by] = _attack(values, other[task], seed, notes)
        found[model] = of_model
    return found


def _attack(forget: Tensor, test: Tensor, seed: int, notes: list[str]) -> dict[str, Any] | None:
    try:
        return dataclasses.asdict(membership(forget, test, seed=seed))
    except ValueError as error:
        note(notes, str(error))
        return None


def drifts(splits: Mapping[str, Split], indexed: Mapping[str, bool]) -> dict[str, Any]:
    """{model: {split: {task: drift}}} against the original; None without a label.

    A sample has its index only in data that are `indexed`.
    """
    found: dict[str, Any] = {}
    for model in splits["retain"].others:
        of_model = found[model] = {}
        for name, split in splits.items():
            of_model[name] = _drifts(split, model, indexed[name])
    return found


def _drifts(split: Split, model: str, indexed: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task, there in split.labelled.items():
        found[task] = None
        if there:
            found[task] = _drift(split, model, task, indexed)
    return found


def _drift(split: Split, model: str, task: str, indexed: bool) -> dict[str, Any]:
    before, after = split.losses["original"][task], split.losses[model][task]
    found = drift(before, after, split.labels.get(task))
    quantiles = {}
    for share, value in zip(QUANTILES, found.quantiles, strict=True):
        quantiles[f"{share:.0%}"] = value
    worst = []
    for at, change in found.worst:
        index = int(split.index[task][at]) if indexed else None
        worst.append({"index": index, "change": change})
    # a class may be anything, also what cannot be copied
    numbers = dataclasses.asdict(dataclasses.replace(found, worst_class=None))
    plain = numbers | {"quantiles": quantiles, "worst": worst}
    if found.worst_class is not None:
        label, change = found.worst_class
        plain["worst_class"] = [_label(label), change]
    return plain


def _label(label: object) -> object:
    """A class as JSON can hold it."""
    if isinstance(label, str | int) or (isinstance(label, float) and math.isfinite(label)):
        return label
    try:
        return str(label)
    except Exception:  # of the caller's own class
        return shown(label)


def distances(splits: Mapping[str, Split]) -> dict[str, Any] | None:
    """{split: {task: {kl, logit_distance}}}, means and 95 % quantiles; None without retrained outputs."""
    found: dict[str, Any] = {}
    for name, split in splits.items():
        found[name] = {}
        for task, kl in split.kl.items():
            if split.labelled[task]:
                apart = _spread(split.distance[task])
                found[name][task] = {"kl": _spread(kl), "logit_distance": apart}
    if not any(found.values()):
        return None
    return found


def _spread(x: Tensor) -> dict[str, float]:
    ranked = x.sort().values
    at = round(0.95 * (len(x) - 1))
    return {"mean": float(x.mean()), "95%": float(ranked[at])}
