"""The verdict: what the numbers of an audit mean, in plain words, by rules that are written down beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# share of the way from the original's forget score to the reference from which data count as
# removed
WAY = 0.9
PART = 0.5  # from which they count as partly removed
SLACK = 0.02  # a score may fall by so much and count as kept; differences below it show nothing
# scores in this range are means over samples; p has a standard error of at most √(p (1 - p) / n)
SHARE = (0.0, 1.0)
HARM = 0.1  # a fall by more is serious
# standard errors of an AUC of 0.5 that chance may explain; several attacks are looked at
CHANCE = 2.5
# an AUC as far as this from 0.5 should show; where chance explains it, there are too few samples
WIDE = 0.15
NEAR = 0.1  # an AUC further than this from 0.5 does not look like a guess

RULES = (
    "The reference for a forget score is the retrained model's, or the original's test score where there is none.",
    f"Removed: the forget score fell at least {WAY:.0%} of the way to the reference; partly: at least {PART:.0%}; a "
    f"way of less than {SLACK} shows nothing by itself. A score within the reference's standard error √(p (1 − p) / n) "
    f"has arrived (or within {SLACK}, if that is more); one further below is over-forgotten.",
    f"Kept: no score on retained or unseen data, and no other task of the forget data, fell by more than {SLACK}; "
    f"more than {HARM} is serious. With a retrained model a fall counts only as far as retraining does not share it.",
    f"Told apart: the attack's AUC is more than {CHANCE:g} standard errors away from 0.5, on either side, and at least "
    "one further away than the retrained model's, if there is one.",
    f"Too few samples to tell: the attack does not tell them apart, but {CHANCE:g} standard errors are {WIDE} or more, "
    f"so that chance could give {0.5 + WIDE}, or its AUC is further than {NEAR} from 0.5 and still within them.",
    f"Single retained samples are mentioned where the worst 1 % of a task's losses rose by more than {SLACK} beyond "
    "any rise of the mean.",
)


def verdict(data: Mapping[str, Any]) -> dict[str, Any]:
    """Headline, paragraph and three findings from the numbers of an audit; thresholds are our choice.

    Args:
        data: the numbers as `Audit.data` holds them, up to the verdict.

    Returns:
        headline, text; removal, kept and attack, each {level: "good" | "fair" | "poor" | "unknown",
        word, detail}; over_forgotten, the targets that lie below the reference by more than chance
        explains; rules.
    """
    parts = {"removal": _removal(data), "kept": _kept(data), "attack": _attack(data)}
    request = data["request"]
    asked = (
        f"It was asked to forget {_count(request['samples']['forget'])} from "
        f"{'every task' if request['kind'] == 'full' else 'the task' + _s(request['targets']) + ' '}"
        f"{'' if request['kind'] == 'full' else _and(request['targets'])}."
    )
    ideal = (
        "" if "retrained" in data["models"] else
        "No retrained model was given, so what forgetting ideally looks like is estimated from unseen data."
    )  # fmt: skip
    text = " ".join(filter(None, [asked, *(part["detail"] for part in parts.values()), ideal]))
    over = _below(data)
    return {
        "headline": _headline(parts),
        "text": text,
        **parts,
        "over_forgotten": over,
        "rules": list(RULES),
    }


def _headline(parts: Mapping[str, Mapping[str, str]]) -> str:
    gone = {
        "good": "The data are forgotten", "fair": "The data are partly forgotten",
        "poor": "The data are not forgotten", "unknown": "Whether the data are forgotten cannot be told",
    }  # fmt: skip
    over = parts["removal"]["word"] == "over-forgotten"
    first = "The data are over-forgotten" if over else gone[parts["removal"]["level"]]
    kept = {
        "good": "the rest is kept",
        "fair": "the rest suffered somewhat",
        "poor": "the rest was damaged",
    }
    good = parts["removal"]["word"] == "removed"
    join = "and" if good == (parts["kept"]["level"] == "good") else "but"
    trace = "; a trace remains" if parts["attack"]["level"] in ("fair", "poor") and good else ""
    return f"{first}, {join} {kept[parts['kept']['level']]}{trace}."


def aims(data: Mapping[str, Any]) -> dict[str, float]:
    """What forgetting aims at for each target: the retrained model's forget score, or the original's test score.

    A target without labels among the data to forget, or among those of its reference, has none.
    """
    scores = data["scores"]
    reference = (
        scores["retrained"]["forget"] if "retrained" in scores else scores["original"]["test"]
    )
    before = scores["original"]["forget"]
    return {
        t: reference[t] for t in data["request"]["targets"] if None not in (before[t], reference[t])
    }


def _removal(data: Mapping[str, Any]) -> dict[str, str]:
    aim = aims(data)
    before, after = data["scores"]["original"]["forget"], data["scores"]["unlearned"]["forget"]
    if not aim:
        detail = "What was removed cannot be scored: labels of the tasks to forget are missing."
        return {"level": "unknown", "word": "not scored", "detail": detail}
    scores = [
        f"{t} from {_score(before[t])} to {_score(after[t])} (reference {_score(a)})"
        for t, a in aim.items()
    ]
    detail = f"On the data to forget, scores went as follows: {_and(scores)}."
    slack, below = (
        {t: _tolerance(a, data["request"]["samples"]["forget"]) for t, a in aim.items()},
        _below(data),
    )
    far = {t: before[t] - a for t, a in aim.items() if before[t] - a >= SLACK}
    ways = {t: 1.0 if after[t] <= aim[t] + slack[t] < before[t] else (before[t] - after[t]) / way
            for t, way in far.items()}  # fmt: skip
    if below:
        detail += f" That is well below the reference for {_and(below)}: over-forgetting is itself a trace."
    if not ways:
        more = " The original scored no better on these data than the reference, so scores alone show no removal."
        return {"level": "unknown", "word": "not visible in scores", "detail": detail + more}
    least = min(ways.values())
    if least < PART:
        return {"level": "poor", "word": "not removed", "detail": detail}
    if least < WAY:
        return {"level": "fair", "word": "partly removed", "detail": detail}
    return {
        "level": "fair" if below else "good",
        "word": "over-forgotten" if below else "removed",
        "detail": detail,
    }


def _below(data: Mapping[str, Any]) -> list[str]:
    after, samples = data["scores"]["unlearned"]["forget"], data["request"]["samples"]
    return [
        t for t, aim in aims(data).items() if after[t] < aim - _tolerance(aim, samples["forget"])
    ]


def _tolerance(score: float, samples: int) -> float:
    """How far a score may lie from another and count as the same."""
    low, high = SHARE
    return max(SLACK, math.sqrt(score * (1 - score) / samples)) if low <= score <= high else SLACK


def _kept(data: Mapping[str, Any]) -> dict[str, str]:
    scores, targets = data["scores"], data["request"]["targets"]
    places = [(s, t) for s in ("retain", "test") for t in scores["original"][s]]
    places += [("forget", t) for t in scores["original"]["forget"] if t not in targets]
    falls = {(s, t): _fall(scores, s, t) for s, t in places if scores["original"][s][t] is not None}
    (split, task), fall = max(falls.items(), key=lambda item: item[1])
    where = {
        "retain": "retained data",
        "test": "unseen data",
        "forget": "the forget data's other tasks",
    }[split]
    before, after = (scores[model][split][task] for model in ("original", "unlearned"))
    if fall > SLACK:
        word, level = ("damaged", "poor") if fall > HARM else ("some damage", "fair")
        detail = f"Elsewhere the largest loss is on {where}, task {task}: from {_score(before)} to {_score(after)}."
    else:
        word, level = "kept", "good"
        detail = f"No score elsewhere fell by more than {SLACK} beyond what retraining costs." \
            if "retrained" in scores else f"No score elsewhere fell by more than {SLACK}."  # fmt: skip
    return {
        "level": level,
        "word": word,
        "detail": detail + _singles(data["drift"]["unlearned"]["retain"]),
    }


def _singles(drift: Mapping[str, Any]) -> str:
    """Whether the mean hides what happened to single samples."""
    hidden = {
        t: one["worst_mean"] - max(one["mean"], 0.0) for t, one in drift.items() if one is not None
    }
    task, beyond = max(hidden.items(), key=lambda item: item[1])
    if beyond <= SLACK:
        return ""
    return (
        " Single retained samples moved more than the mean shows: the worst 1 % of losses rose by "
        f"{drift[task]['worst_mean']:.2g} (task {task}), the mean changed by {drift[task]['mean']:+.2g}."
    )


def _fall(scores: Mapping[str, Any], split: str, task: str) -> float:
    """How far a score fell, less what it fell by retraining."""
    before, after = scores["original"][split][task], scores["unlearned"][split][task]
    bound = before if "retrained" not in scores else min(before, scores["retrained"][split][task])
    return float(bound - after)


def _attack(data: Mapping[str, Any]) -> dict[str, str]:
    found = data["membership"].get("unlearned", {})
    values = [
        (task, by, found[task][by])
        for task in data["request"]["targets"]
        if task in found
        for by in found[task]
    ]
    values = [value for value in values if value[2] is not None]
    if not values:
        return {
            "level": "unknown",
            "word": "not tested",
            "detail": "Membership inference could not be tested.",
        }
    ideals = data["membership"].get("retrained", {})
    task, by, worst = max(
        values, key=lambda value: _excess(value[2], ideals.get(value[0], {}).get(value[1]))
    )
    ideal = ideals.get(task, {}).get(by)
    beside = f"; the retrained model gives {ideal['auc']:.2f}" if ideal else ""
    auc = f"AUC {worst['auc']:.2f}, chance is 0.50 ± {CHANCE * worst['error']:.2f}"
    if _excess(worst, ideal) <= 0:
        blurred = [value for value in values if _is_blurred(value[2])]
        if blurred:
            return _too_few(
                *max(blurred, key=lambda value: (value[2]["error"], abs(value[2]["auc"] - 0.5)))
            )
        detail = (
            "An attacker who sees one number per sample cannot tell them from unseen data better than chance"
            + (" or than with the retrained model." if ideal else ".")
        )
        return {"level": "good", "word": "not told apart", "detail": detail}
    detail = (
        f"An attacker can tell them from unseen data by the {by} of task {task} ({auc}{beside})."
    )
    return {
        "level": "poor" if abs(worst["auc"] - 0.5) > 0.25 else "fair",
        "word": "told apart",
        "detail": detail,
    }


def _is_blurred(found: Mapping[str, float]) -> bool:
    """Whether chance explains so much that not being told apart means little."""
    chance = CHANCE * found["error"]
    return chance >= WIDE or NEAR < abs(found["auc"] - 0.5) <= chance


def _too_few(task: str, by: str, found: Mapping[str, float]) -> dict[str, str]:
    detail = (
        "There are too few samples to tell whether an attacker can tell them from unseen data: by the "
        f"{by} of task {task} the AUC is {found['auc']:.2f} with {found['samples']} samples of either kind, and chance "
        f"alone gives 0.50 ± {CHANCE * found['error']:.2f}."
    )
    return {"level": "unknown", "word": "too few samples to tell", "detail": detail}


def _excess(found: Mapping[str, float], ideal: Mapping[str, float] | None) -> float:
    """How many standard errors an AUC lies outside what chance and the retrained model explain."""
    away = abs(found["auc"] - 0.5) / found["error"]
    bound = CHANCE if ideal is None else max(CHANCE, abs(ideal["auc"] - 0.5) / found["error"] + 1)
    return away - bound


def _score(value: float) -> str:
    return f"{value:.3f}"


def _count(samples: int) -> str:
    return f"{samples} sample{'' if samples == 1 else 's'}"


def _s(names: Sequence[str]) -> str:
    return "" if len(names) == 1 else "s"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
