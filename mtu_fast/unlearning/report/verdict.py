"""The verdict: what the numbers of an audit mean, in plain words, by rules that are written down beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtu_fast.unlearning.report.attack import attack
from mtu_fast.unlearning.report.kept import kept
from mtu_fast.unlearning.report.levels import guessed
from mtu_fast.unlearning.report.removal import over_forgotten, removal
from mtu_fast.unlearning.report.rules import RULES
from mtu_fast.unlearning.report.words import Finding, listed, samples

GONE = {
    "good": "The data are forgotten",
    "fair": "The data are partly forgotten",
    "poor": "The data are not forgotten",
    "unknown": "Whether the data are forgotten cannot be told",
}
REST = {
    "good": "the rest is kept",
    "fair": "the rest suffered somewhat",
    "poor": "the rest was damaged",
}


def verdict(data: Mapping[str, Any]) -> dict[str, Any]:
    """Headline, paragraph and three findings from the numbers of an audit; thresholds are our choice.

    Args:
        data: the numbers as `Audit.data` holds them, up to the verdict.

    Returns:
        headline, text; removal, kept and attack, each {level: "good" | "fair" | "poor" | "unknown",
        word, detail}; over_forgotten, the targets that lie below the reference by more than chance
        explains; rules.
    """
    parts = {"removal": removal(data), "kept": kept(data), "attack": attack(data)}
    sentences = [_asked(data["request"])]
    for part in parts.values():
        sentences.append(part["detail"])
    if guessed(data):
        sentences.append(
            "No retrained model was given, so chance stands for what forgetting the class ideally looks like."
        )
    elif "retrained" not in data["models"]:
        sentences.append(
            "No retrained model was given, so what forgetting ideally looks like is estimated from unseen data."
        )
    return {
        "headline": _headline(parts),
        "text": " ".join(sentences),
        **parts,
        "over_forgotten": over_forgotten(data),
        "rules": list(RULES),
    }


def _asked(request: Mapping[str, Any]) -> str:
    what = "every task"
    if request["kind"] != "full":
        targets = request["targets"]
        what = f"the {'task' if len(targets) == 1 else 'tasks'} {listed(targets)}"
    return f"It was asked to forget {samples(request['samples']['forget'])} from {what}."


def _headline(parts: Mapping[str, Finding]) -> str:
    gone, rest, told = parts["removal"], parts["kept"], parts["attack"]
    first = GONE[gone["level"]]
    if gone["word"] == "over-forgotten":
        first = "The data are over-forgotten"
    removed = gone["word"] == "removed"
    join = "and" if removed == (rest["level"] == "good") else "but"
    trace = ""
    if removed and told["level"] in ("fair", "poor"):
        trace = "; a trace remains"
    return f"{first}, {join} {REST[rest['level']]}{trace}."
