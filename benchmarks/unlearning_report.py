"""The table of the unlearning benchmark as text, and its plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.methods import OURS
from benchmarks.unlearning_records import MODELS, Mode
from benchmarks.unlearning_stats import (
    Name,
    Paired,
    Row,
    gaps,
    goals,
    groups,
    label,
    ours,
    paired,
    spread,
)

# column of a row: heading, factor, decimals
COLUMNS: dict[str, tuple[str, float, int]] = {
    "uis": ("UIS", 1, 1), "gap": ("gap", 100, 1), "gap_forget": ("gap F", 100, 1), "gap_retain": ("gap R", 100, 1),
    "gap_test": ("gap T", 100, 1), "tow": ("ToW", 1, 2), "auc": ("MIA AUC", 100, 1), "drift": ("drift", 1, 3),
    "drift_99": ("drift 99%", 1, 2), "shift": ("shift", 100, 1),
}  # fmt: skip
NOTES = (
    "Mean ± standard deviation over seeds; (n): of fewer seeds than asked for. UIS (lower is better) is against the",
    "original; gaps (points, mean and on forget, retain and test data) and ToW (1 is best) against the retrained. MIA",
    "AUC: how well logistic regression on the loss tells F from test data (50 is chance; the retrained model's is the",
    "aim), the mean over target tasks: one at 30 and one at 70 give 50 too. drift: mean rise of the loss of what is to",
    "be kept, and its 99 % quantile. shift: of the parameters, in percent. steps*: on some seed the setting did not",
    "bring the forget score down to the level. !: on some seed forgot more of a target task than the retrained one.",
    "settled: with levels, made all steps, at rates that fall to zero from the level on; the model is that of the",
    "evaluation at the level with the least UIS on validation data. steps, ms, s: steps made, what one and what all of",
    "them take in processor time of one thread, evaluations left out, beside other work; ref: the time of a step by",
    "the slow reference over ours, timed alone. Settings were chosen on seed 0, those of requests other than full and",
    "partial with these. Class: of one task; UIS then wants a forget score of 0, while chance is the level.",
)
WIDTH = 14
COLOURS = {Mode.PLAIN: "#0072b2", Mode.LEVELS: "#c96a00", Mode.SETTLED: "#00805f"}


def text(result: Mapping[str, Any]) -> str:
    """The result as plain text: a block a request, a line a method; what is missing; differences and goals."""
    headings = "".join(f"{heading:>{WIDTH}}" for heading, _, _ in COLUMNS.values())
    found = {request: groups(result, request) for request in result["requests"]}
    names = [label(name) for rows in found.values() for name in rows]
    width = 2 + max(map(len, names), default=0)
    head = f"{'':{width}}{headings}{'steps':>7} {'ms':>8}{'s':>8}{'ref':>7}"
    rule = "-" * len(head)
    lines = [head]
    for request, targets in result["requests"].items():
        times = result.get("times", {}).get(request, {})
        lines += [rule, f"{request}: forget from {', '.join(targets)}"]
        for name, rows in found[request].items():
            lines.append(_line(name, width, rows, len(result["seeds"]), times))
    lines += [rule, *NOTES, *missing(result)]
    for request, rows_of in found.items():
        lines += comparisons(request, rows_of)
    return "\n".join(lines)


def _line(
    name: Name,
    width: int,
    rows: Sequence[Row],
    seeds: int,
    times: Mapping[str, Mapping[str, float]],
) -> str:
    over = name[0] != "retrained" and any(row["over_forgotten"] for row in rows)
    few = f" ({len(rows)})" if len(rows) < seeds else ""
    cells = []
    for column, (_, factor, digits) in COLUMNS.items():
        mean, deviation = (factor * value for value in spread(rows, column))
        cells.append(f"{f'{mean:.{digits}f} ±{deviation:.{digits}f}':>{WIDTH}}")
    line = f"{label(name) + few + ('!' if over else ''):{width}}" + "".join(cells)
    if name[0] in MODELS:
        return line
    star = " " if all(row["reached"] for row in rows) else "*"
    time = times.get(name[0], {}) if name[1] is Mode.PLAIN else {}
    ratio = f"{time['ratio']:.1f}x" if "ratio" in time else "-"
    steps, ms, seconds = (spread(rows, column)[0] for column in ("steps", "ms", "seconds"))
    return f"{line}{steps:7.0f}{star}{ms:8.0f}{seconds:8.1f}{ratio:>7}"


# ---- what the table does not say -----------------------------------------------------------------


def missing(result: Mapping[str, Any]) -> Iterator[str]:
    """What the table is to have and does not, a line a reason."""
    if not result["missing"]:
        return
    yield ""
    yield "THIS TABLE IS NOT COMPLETE. Missing:"
    yield from (f"  {said}" for said in gaps(result["missing"]))


def comparisons(request: str, found: Mapping[Name, Sequence[Row]]) -> Iterator[str]:
    """Our method beside the strongest others, paired by seed, and what it was to reach."""
    mine = found.get(ours(found), [])
    others = [name for name in found if name[0] not in (OURS, *MODELS)]
    if not mine or not others:
        return
    yield ""
    yield f"{request}: {label(ours(found))} minus the other, paired by seed, with 95 % intervals (Student's t)"
    others.sort(key=lambda name: spread(found[name], "uis")[0])
    for name in others:
        cells = [
            f"{column} {interval(paired(mine, found[name], column), *COLUMNS[column][1:])}"
            for column in ("uis", "gap", "drift")
        ]
        yield f"  {label(name):40} {'   '.join(cells)}"
    for goal in goals(found, request):
        word = "reached" if goal.reached else "NOT REACHED"
        yield f"  {word}: {goal.what} is {goal.found:.2f}, aimed at {goal.aim:.2f} or less"


def interval(found: Paired | None, factor: float, digits: int) -> str:
    """A paired difference as "mean [low, high] (seeds)"."""
    if found is None:
        return "-"
    mean, low, high = (factor * value for value in (found.mean, found.low, found.high))
    if found.seeds == 1:
        return f"{mean:+.{digits}f} (1 seed)"
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] ({found.seeds} seeds)"


# ---- the plot ------------------------------------------------------------------------------------


def plot(result: Mapping[str, Any], path: Path) -> None:
    """UIS, and the gap to retraining, of each method with its standard deviation: a row a request; to a PNG."""
    requests = result["requests"]
    counts = [len(groups(result, request)) for request in requests]
    size = (11, sum(0.9 + 0.24 * count for count in counts))
    figure, axes = plt.subplots(
        len(requests), 2, figsize=size, squeeze=False, layout="constrained", height_ratios=[2 + n for n in counts]
    )  # fmt: skip
    for row, (request, targets) in zip(axes, requests.items(), strict=True):
        found = groups(result, request)
        order = sorted(
            (n for n in found if n[0] != "retrained"), key=lambda n: -spread(found[n], "uis")[0]
        )
        _bars(row[0], found, order, "uis", "UIS")
        _bars(row[1], found, order, "gap", "mean gap to retraining in points")
        row[0].set_yticks(range(len(order)), [label(name) for name in order])
        row[1].set_yticks(range(len(order)), [])
        ideal = found.get(("retrained", Mode.PLAIN))
        if ideal:
            at = spread(ideal, "uis")[0]
            row[0].axvline(at, color="0.45", linestyle="--", linewidth=1)
        title = f"{request}: forget from {', '.join(targets)}"
        row[0].set_title(title, loc="left", fontsize=10)
    incomplete = ", not complete" if result["missing"] else ""
    figure.suptitle(
        f"Unlearning on {result['data']}, {len(result['seeds'])} seeds{incomplete} "
        "(orange: with levels; green: settled; hollow: did not forget enough; dashed: retrained)",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(
    axis: Any, found: Mapping[Name, Sequence[Row]], order: Sequence[Name], column: str, title: str
) -> None:
    factor = COLUMNS[column][1]
    for y, name in enumerate(order):
        mean, deviation = (factor * value for value in spread(found[name], column))
        reached = all(row.get("reached", True) for row in found[name])
        colour = "0.6" if name[0] in MODELS else COLOURS[name[1]]
        inside = colour if reached else "white"
        axis.errorbar(mean, y, xerr=deviation, fmt="o", color=colour, mfc=inside)
    axis.set(xlabel=f"{title} (lower is better)", xlim=(0, None))
    axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
