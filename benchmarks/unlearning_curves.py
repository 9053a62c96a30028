"""How runs go: the forget score against the drift of what is kept, and both over steps, of the best methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.unlearning_records import Mode
from benchmarks.unlearning_stats import LEADERS, Name, Row, groups, label, ranked

# told apart without colour vision too
COLOURS = ("#0072b2", "#c96a00", "#00805f", "#a8408a", "#7d7500")
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
KINDS = ("full", "partial")


def plot_curves(result: Mapping[str, Any], path: Path) -> None:
    """Forget score against drift, and each over steps, of the five lowest UIS: a row a request; to a PNG."""
    requests = [name for name in result["requests"] if name in KINDS]
    count = max(len(requests), 1)
    figure, axes = plt.subplots(
        count, 3, figsize=(13, 3.9 * count), squeeze=False, layout="constrained"
    )
    for row, request in zip(axes, requests, strict=False):
        found, targets = groups(result, request), result["requests"][request]
        for at, name in enumerate(ranked(found)[:LEADERS]):
            _lines(row, found[name], targets, name, at)
        _ideal(row, found, targets)
        _dress(row, request)
    figure.suptitle(
        f"Unlearning on {result['data']}: the lowest UIS of those run, a line a seed, its end marked "
        "(star: retrained)"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _lines(
    row: Sequence[Any], rows: Sequence[Row], targets: Sequence[str], name: Name, at: int
) -> None:
    """One method in the three panels."""
    style: dict[str, Any] = {"color": COLOURS[at], "linestyle": STYLES[at], "linewidth": 1.3}
    for i, run in enumerate(rows):
        steps, gone, drift = course(run, targets)
        words = label(name) if i == 0 else None
        for axis, x, y in zip(row, (gone, steps, steps), (drift, gone, drift), strict=True):
            axis.plot(x, y, label=words, **style)
            axis.plot(x[-1], y[-1], "o", color=COLOURS[at], markersize=4)


def course(run: Row, targets: Sequence[str]) -> tuple[list[float], list[float], list[float]]:
    """(steps, mean forget score of the targets in percent, drift) of a run, its end from the table."""
    steps: list[float] = []
    gone: list[float] = []
    drift: list[float] = []
    for seen in run["history"]:
        rise = seen.get("drift", run["drift"] if seen is run["history"][-1] else None)
        if rise is None:
            continue
        steps.append(seen["step"])
        gone.append(100 * sum(seen["forget"][task] for task in targets) / len(targets))
        drift.append(rise)
    return steps, gone, drift


def _ideal(row: Sequence[Any], found: Mapping[Name, Sequence[Row]], targets: Sequence[str]) -> None:
    for run in found.get(("retrained", Mode.PLAIN), ()):
        scores = run["scores"]["forget"]
        gone = 100 * sum(scores[task] for task in targets) / len(targets)
        row[0].plot(gone, run["drift"], "*", color="0.2", markersize=9, zorder=5)
        row[1].axhline(gone, color="0.6", linewidth=0.7, linestyle=(0, (6, 3)))


def _dress(row: Sequence[Any], request: str) -> None:
    gone, drift = "forget score, percent", "drift: mean rise of the loss of what is kept"
    row[0].set(xlabel=f"{gone} (falls to the right)", ylabel=drift, title=request)
    row[0].invert_xaxis()
    row[1].set(xlabel="step", ylabel=gone, title="forgetting over steps")
    row[2].set(xlabel="step", ylabel=drift, title="drift over steps")
    if row[0].get_legend_handles_labels()[0]:
        row[0].legend(fontsize=8, frameon=False)
    for axis in row:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
