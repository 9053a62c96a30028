"""The numbers of an audit from what was measured: scores, attack, drift, distances, cost, as plain data for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtu_fast.unlearning.metrics import drift, gaps, mean_gap, membership, over_forgotten, tow, uis
from mtu_fast.unlearning.metrics.drift import QUANTILES
from mtu_fast.unlearning.report.passes import Split

BINS = 41


def plain(value: Any) -> Any:
    """Mappings, lists, strings, finite numbers and None: what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def comparisons(
    scores: Mapping[str, Any], targets: Sequence[str], removal: str, notes: list[str]
) -> dict[str, Any]:
    """UIS of every model; gaps, ToW and over-forgetting where a retrained model is; None, with a note, where not.

    All are of the tasks that have a score on all of the data.
    """

    def attempt(name: str, score: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return score(*arguments)
        except ValueError as error:
            note(notes, f"{name} left out: {error}.")
            return None

    splits = scores["original"].values()
    tasks = list(scores["original"]["forget"])
    known = [task for task in tasks if all(row[task] is not None for row in splits)]
    chosen = [task for task in targets if task in known]
    if not chosen:
        notes.append(
            "UIS, gaps, ToW and over-forgetting left out: no task to forget has labels in all of the data."
        )
        return {"uis": dict.fromkeys(scores)} | dict.fromkeys((
            "gaps",
            "mean_gap",
            "tow",
            "over_forgotten",
        ))
    if known != tasks:
        notes.append(
            f"UIS, gaps, ToW and over-forgetting are of the tasks with labels in all of the data: {known}."
        )
    tables = {
        m: {split: {t: row[t] for t in known} for split, row in table.items()}
        for m, table in scores.items()
    }
    o, u, r = tables["original"], tables["unlearned"], tables.get("retrained")
    return {
        "uis": {
            model: attempt("UIS", uis, o, table, chosen, removal) for model, table in tables.items()
        },
        "gaps": None if r is None else gaps(u, r),
        "mean_gap": None if r is None else mean_gap(u, r),
        "tow": None if r is None else attempt("ToW", tow, u, r),
        "over_forgotten": None if r is None else over_forgotten(u, r, chosen),
    }


def note(notes: list[str], text: str) -> None:
    """Say it once."""
    if text not in notes:
        notes.append(text)


def attacks(splits: Mapping[str, Split], seed: int, notes: list[str]) -> dict[str, Any]:
    """Membership inference, forget against test: {model: {task: {loss, entropy}}}; None where it could not be made."""
    found: dict[str, Any] = {}
    for model in splits["forget"].losses:
        found[model] = {}
        for by in ("loss", "entropy"):
            sides = [
                splits[s].losses[model] if by == "loss" else splits[s].entropy[model]
                for s in ("forget", "test")
            ]
            for task in sides[0]:
                result = None
                try:
                    result = dataclasses.asdict(
                        membership(sides[0][task], sides[1][task], seed=seed)
                    )
                except ValueError as error:
                    note(notes, str(error))
                found[model].setdefault(task, {})[by] = result
    return found


def drifts(splits: Mapping[str, Split], indexed: Mapping[str, bool]) -> dict[str, Any]:
    """{model: {split: {task: drift}}} of unlearned and retrained against the original; None without a label.

    A sample has its index only in data that are `indexed`.
    """
    models = [model for model in splits["retain"].losses if model != "original"]
    return {
        model: {
            name: {
                task: _drift(split, model, task, indexed[name]) if there else None
                for task, there in split.labelled.items()
            }
            for name, split in splits.items()
        }
        for model in models
    }  # fmt: skip


def _drift(split: Split, model: str, task: str, indexed: bool) -> dict[str, Any]:
    found = drift(split.losses["original"][task], split.losses[model][task], split.labels.get(task))
    index = split.index[task]
    quantiles = {f"{q:.0%}": value for q, value in zip(QUANTILES, found.quantiles, strict=True)}
    worst = [
        {"index": int(index[i]) if indexed else None, "change": change} for i, change in found.worst
    ]
    return dataclasses.asdict(found) | {"quantiles": quantiles, "worst": worst}


def histograms(splits: Mapping[str, Split]) -> dict[str, Any]:
    """{split: {task: {edges, counts: {model: [...]}}}} of loss changes; the end bins hold all that lies beyond."""

    def changes(split: Split, task: str) -> dict[str, Tensor]:
        before = split.losses["original"][task]
        return {
            model: row[task] - before for model, row in split.losses.items() if model != "original"
        }

    return {
        name: {
            task: _histogram(changes(split, task)) if there else None
            for task, there in split.labelled.items()
        }
        for name, split in splits.items()
    }


def _histogram(changes: Mapping[str, Tensor]) -> dict[str, Any]:
    ranked = [change.sort().values for change in changes.values()]
    ends = [float(change[_at(change, q)]) for change in ranked for q in (0.005, 0.995)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    if high - low < 1e-9:
        low, high = -0.5, 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    counts = {
        model: torch.bincount(_bin(change, low, high), minlength=BINS)
        for model, change in changes.items()
    }
    return {
        "edges": edges.tolist(),
        "counts": {model: count.tolist() for model, count in counts.items()},
    }


def _at(change: Tensor, q: float) -> int:
    return round(q * (len(change) - 1))


def _bin(change: Tensor, low: float, high: float) -> Tensor:
    return ((change - low) / (high - low) * BINS).floor().clamp(0, BINS - 1).long()


def distances(splits: Mapping[str, Split]) -> dict[str, Any] | None:
    """{split: {task: {kl, logit_distance}}}, means and 95 % quantiles; None without retrained outputs."""
    found = {
        name: {
            task: {"kl": _spread(split.kl[task]), "logit_distance": _spread(split.distance[task])}
            for task in split.kl
            if split.labelled[task]
        }
        for name, split in splits.items()
    }
    return found if any(found.values()) else None


def _spread(x: Tensor) -> dict[str, float]:
    return {"mean": float(x.mean()), "95%": float(x.sort().values[_at(x, 0.95)])}


def records(history: object) -> list[dict[str, Any]] | None:
    """The records of a history, plain: dictionaries or dataclasses with `step`.

    Raises:
        TypeError: no `.records`, or records that are neither.
    """
    if history is None:
        return None
    found = getattr(history, "records", history)
    if not isinstance(found, Sequence):
        raise TypeError(
            f"history: found {type(history).__name__}, expected something with .records, a list."
        )
    rows = [
        dataclasses.asdict(r) if dataclasses.is_dataclass(r) and not isinstance(r, type) else r
        for r in found
    ]
    if any(not isinstance(row, Mapping) or "step" not in row for row in rows):
        raise TypeError(
            'history: a record is a mapping or dataclass with "step", the number of steps so far.'
        )
    return [plain(row) for row in rows]


def step_cost(
    cost: Mapping[str, Any] | None, history: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any] | None:
    """The cost as given; with a history whose records hold "seconds" since the start, also the time of a step."""
    found = dict(plain(cost or {}))
    timed = [r for r in history or () if isinstance(r.get("seconds"), int | float)]
    if len(timed) > 1 and timed[-1]["step"] > timed[0]["step"]:
        seconds, steps = (
            timed[-1]["seconds"] - timed[0]["seconds"],
            timed[-1]["step"] - timed[0]["step"],
        )
        found |= {
            "steps": steps,
            "seconds": seconds,
            "ms a step, from the history": 1000 * seconds / steps,
        }
    return found or None
