"""The report's first section: the verdict and the scores that sum it up."""

from __future__ import annotations

from typing import Any

from mtu_fast.unlearning.report.markup import Markup, el, number
from mtu_fast.unlearning.report.tables import Data

ORDER = ("good", "unknown", "fair", "poor")
SIGNS = {"good": "✓", "fair": "△", "poor": "✕", "unknown": "?"}
NAMES = {"removal": "The data to forget", "kept": "Everything else", "attack": "Membership attack"}


def verdict(data: Data) -> Markup:
    """Headline, paragraph, three findings and the summary scores."""
    found = data["verdict"]
    levels = [found[part]["level"] for part in NAMES]
    worst = max(levels, key=ORDER.index)
    findings = [_finding(name, found[part]) for part, name in NAMES.items()]
    return el(
        "section",
        el("p", found["headline"], class_="headline"),
        el("p", found["text"]),
        el("dl", findings, class_="tiles"),
        el("dl", _scores(data), class_="tiles"),
        class_=f"card verdict {worst}",
    )


def _finding(name: str, found: Data) -> Markup:
    level = found["level"]
    return _tile(name, el("span", f"{SIGNS[level]} {found['word']}", class_=level))


def _scores(data: Data) -> list[Markup]:
    moved = f"{number(100 * data['parameter_shift'], 2)} %"
    shift = _tile("Parameters moved", moved, "of the norm of all")
    if "retrained" not in data["models"]:
        return [_uis(data), shift]
    gap = _tile("Mean gap to retrained", number(data["mean_gap"]), "0 is ideal")
    return [_uis(data), gap, _tow(data), shift, _over_forgotten(data)]


def _uis(data: Data) -> Markup:
    uis = data["uis"]
    small = f"before: {number(uis['original'], 1)}"
    if "retrained" in uis:
        small += f", retrained: {number(uis['retrained'], 1)}"
    return _tile("UIS, lower is better", number(uis["unlearned"], 1), small)


def _tow(data: Data) -> Markup:
    tow, mean = data["tow"], None
    if tow is not None:
        mean = sum(tow.values()) / len(tow)
    return _tile("ToW, mean over tasks", number(mean), "1 is ideal")


def _over_forgotten(data: Data) -> Markup:
    over: Any = data["over_forgotten"]
    if over is None:
        names: Any = number(None)
    elif over:
        names = el("span", f"⚑ {', '.join(over)}", class_="poor")
    else:
        names = "none"
    return _tile("Below the retrained model", names, "on the data to forget")


def _tile(name: str, value: Any, small: str | None = None) -> Markup:
    note = None if small is None else el("small", small)
    return el("div", el("dt", name), el("dd", value, note), class_="tile")
