"""The verdict on what was to be forgotten: how far its scores fell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mtu_fast.unlearning.report.levels import aims, guessed
from mtu_fast.unlearning.report.rules import PART, SHARE, SLACK, WAY
from mtu_fast.unlearning.report.words import Finding, finding, listed, score

Scores = Mapping[str, float]


def removal(data: Mapping[str, Any]) -> Finding:
    """Whether the forget scores fell to what forgetting aims at."""
    aim = aims(data)
    if not aim:
        missing = "What was removed cannot be scored: labels of the tasks to forget are missing."
        return finding("unknown", "not scored", missing)
    below, detail = over_forgotten(data), _course(data, aim)
    if below:
        detail += f" That is well below the reference for {listed(below)}: over-forgetting is itself a trace."
    ways = _ways(data, aim)
    if not ways:
        detail += " The original scored no better on these data than the reference, so scores alone show no removal."
        return finding("unknown", "not visible in scores", detail)
    least = min(ways)
    if least < PART:
        return finding("poor", "not removed", detail)
    if least < WAY:
        return finding("fair", "partly removed", detail)
    if below:
        return finding("fair", "over-forgotten", detail)
    return finding("good", "removed", detail)


def over_forgotten(data: Mapping[str, Any]) -> list[str]:
    """The targets whose forget score lies below the reference by more than chance explains.

    A removed class has none below chance: a model that never saw the class never guesses it.
    """
    if guessed(data):
        return []
    after = data["scores"]["unlearned"]["forget"]
    found = []
    for task, aim in aims(data).items():
        if after[task] < aim - _tolerance(data, aim):
            found.append(task)
    return found


def _course(data: Mapping[str, Any], aim: Scores) -> str:
    before, after = data["scores"]["original"]["forget"], data["scores"]["unlearned"]["forget"]
    parts = []
    for task, level in aim.items():
        course = f"from {score(before[task])} to {score(after[task])}"
        parts.append(f"{task} {course} (reference {score(level)})")
    return f"On the data to forget, scores went as follows: {listed(parts)}."


def _ways(data: Mapping[str, Any], aim: Scores) -> list[float]:
    """Which share of the way to the reference each target went, where that is far enough to tell."""
    before, after = data["scores"]["original"]["forget"], data["scores"]["unlearned"]["forget"]
    found = []
    for task, level in aim.items():
        way = before[task] - level
        # a share of next to nothing would be noise
        if way < SLACK:
            continue
        # within the reference's own error it has arrived, however short the way was
        if after[task] <= level + _tolerance(data, level) < before[task]:
            found.append(1.0)
        else:
            found.append((before[task] - after[task]) / way)
    return found


def _tolerance(data: Mapping[str, Any], level: float) -> float:
    """How far a forget score may lie from another and count as the same."""
    low, high = SHARE
    if not low <= level <= high:
        return SLACK
    return max(SLACK, math.sqrt(level * (1 - level) / data["request"]["samples"]["forget"]))
