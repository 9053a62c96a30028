"""The verdict on everything that was to stay: how far scores fell, and what a mean hides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mtu_fast.unlearning.report.levels import guessed
from mtu_fast.unlearning.report.rules import HARM, SLACK
from mtu_fast.unlearning.report.words import Finding, finding, score

PLACES = {
    "retain": "retained data",
    "test": "unseen data",
    "forget": "the forget data's other tasks",
}


def kept(data: Mapping[str, Any]) -> Finding:
    """Whether a score fell that was to stay."""
    scores = data["scores"]
    falls = {}
    for split, task in _places(data):
        if scores["original"][split][task] is not None:
            falls[split, task] = _fall(scores, split, task) - _class(data, split, task)
    split, task = max(falls, key=lambda place: falls[place])
    fall = falls[split, task]
    singles = _singles(data["drift"]["unlearned"]["retain"])
    if fall <= SLACK:
        return finding("good", "kept", _no_fall(scores) + singles)
    before, after = scores["original"][split][task], scores["unlearned"][split][task]
    course = f"from {score(before)} to {score(after)}"
    detail = f"Elsewhere the largest loss is on {PLACES[split]}, task {task}: {course}."
    if fall > HARM:
        return finding("poor", "damaged", detail + singles)
    return finding("fair", "some damage", detail + singles)


def _places(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(split, task) of the scores that are to stay."""
    scores = data["scores"]["original"]
    for split in ("retain", "test"):
        for task in scores[split]:
            yield split, task
    for task in scores["forget"]:
        if task not in data["request"]["targets"]:
            yield "forget", task


def _fall(scores: Mapping[str, Any], split: str, task: str) -> float:
    """How far a score fell, less what it fell by retraining."""
    bound = scores["original"][split][task]
    # what retraining costs as well is no damage of the unlearning
    if "retrained" in scores:
        bound = min(bound, scores["retrained"][split][task])
    return float(bound - scores["unlearned"][split][task])


def _class(data: Mapping[str, Any], split: str, task: str) -> float:
    """What a target's test score loses with a class that test data hold, where no retrained model says it."""
    if split != "test" or not guessed(data):
        return 0.0
    return float(data["request"]["share"].get(task) or 0.0)


def _no_fall(scores: Mapping[str, Any]) -> str:
    beyond = " beyond what retraining costs" if "retrained" in scores else ""
    return f"No score elsewhere fell by more than {SLACK}{beyond}."


def _singles(drift: Mapping[str, Any]) -> str:
    """Whether the mean hides what happened to single samples."""
    hidden = {}
    for task, one in drift.items():
        if one is not None:
            hidden[task] = one["worst_mean"] - max(one["mean"], 0.0)
    worst = max(hidden, key=lambda task: hidden[task])
    if hidden[worst] <= SLACK:
        return ""
    one = drift[worst]
    return (
        " Single retained samples moved more than the mean shows: the worst 1 % of losses rose by "
        f"{one['worst_mean']:.2g} (task {worst}), the mean changed by {one['mean']:+.2g}."
    )
