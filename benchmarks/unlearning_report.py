"""The table of the unlearning benchmark as text, and its plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

# column of a row: heading, factor, decimals
COLUMNS: dict[str, tuple[str, float, int]] = {
    "uis": ("UIS", 1, 1), "gap": ("gap", 100, 1), "gap_forget": ("gap F", 100, 1), "gap_retain": ("gap R", 100, 1),
    "gap_test": ("gap T", 100, 1), "tow": ("ToW", 1, 2), "auc": ("MIA AUC", 100, 1), "drift": ("drift", 1, 3),
    "drift_99": ("drift 99%", 1, 2), "shift": ("shift", 100, 1),
}  # fmt: skip
NOTES = (
    "Mean ± standard deviation over seeds. UIS (lower is better) is against the original; gaps (points, mean and on",
    "forget, retain and test data) and ToW (1 is best) against the retrained. MIA AUC: how well logistic regression on",
    "the loss tells F from test data (50 is chance; the retrained model's is the aim), the mean over target tasks: one",
    "at 30 and one at 70 give 50 too. drift: mean rise of the loss of what is to be kept, and its 99 % quantile.",
    "shift: of the parameters, in percent. steps*: in some seed no setting brought the forget score down to that of",
    "validation data. !: in some seed forgot more of a target task than the retrained (over-forgetting). ms: a step by",
    "mtu_fast on one thread, forward to .grad, the mean over the steps from one refresh (of a subspace or of τ) to the",
    "next; ref: the time of a step by the slow reference, which refreshes nothing, over it.",
)
WIDTH = 14

Rows = list[Mapping[str, Any]]


def groups(result: Mapping[str, Any], request: str) -> dict[str, Rows]:
    """{method: its rows over seeds}, in the order of the table."""
    found: dict[str, Rows] = {}
    for row in result["rows"]:
        if row["request"] == request:
            found.setdefault(row["method"], []).append(row)
    return found


def spread(rows: Rows, column: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds (0 for one seed)."""
    values = [row[column] for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def text(result: Mapping[str, Any]) -> str:
    """The result as one plain-text table: a block a request, a line a method."""
    headings = "".join(f"{heading:>{WIDTH}}" for heading, _, _ in COLUMNS.values())
    width = 2 + max(len(name) for request in result["requests"] for name in groups(result, request))
    head = f"{'':{width}}{headings}{'steps':>7} {'ms':>8}{'ref':>7}"
    rule = "-" * len(head)
    lines = [head]
    for request, targets in result["requests"].items():
        lines += [rule, f"{request}-task: forget from {', '.join(targets)}"]
        lines += [
            _line(n, width, rows, result["times"][request])
            for n, rows in groups(result, request).items()
        ]
    return "\n".join([*lines, rule, *NOTES])


def _line(name: str, width: int, rows: Rows, times: Mapping[str, Mapping[str, float]]) -> str:
    flag = "!" if name != "retrained" and any(row["over_forgotten"] for row in rows) else ""
    cells = []
    for column, (_, factor, digits) in COLUMNS.items():
        mean, deviation = (factor * value for value in spread(rows, column))
        cells.append(f"{mean:.{digits}f} ±{deviation:.{digits}f}")
    line = f"{name + flag:{width}}" + "".join(f"{cell:>{WIDTH}}" for cell in cells)
    if name not in times:
        return line
    star = " " if all(row["reached"] for row in rows) else "*"
    ratio = f"{times[name]['ratio']:.1f}x" if "ratio" in times[name] else "-"
    return f"{line}{spread(rows, 'steps')[0]:7.0f}{star}{times[name]['fast']:8.1f}{ratio:>7}"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """UIS, and the gap to retraining, of each method with its standard deviation: a row a request; to a PNG."""
    requests = result["requests"]
    count = len(groups(result, next(iter(requests))))
    size = (11, (0.9 + 0.26 * count) * len(requests))
    figure, axes = plt.subplots(len(requests), 2, figsize=size, squeeze=False, layout="constrained")
    for row, (request, targets) in zip(axes, requests.items(), strict=True):
        found = groups(result, request)
        order = sorted(
            (n for n in found if n != "retrained"), key=lambda n: -spread(found[n], "uis")[0]
        )
        for axis, column, label in (
            (row[0], "uis", "UIS"),
            (row[1], "gap", "mean gap to retraining in points"),
        ):
            factor = COLUMNS[column][1]
            for y, name in enumerate(order):
                mean, deviation = (factor * value for value in spread(found[name], column))
                reached = all(r.get("reached", True) for r in found[name])
                colour = "0.6" if name == "original" else "#0072b2"
                axis.errorbar(
                    mean,
                    y,
                    xerr=deviation,
                    fmt="o",
                    color=colour,
                    mfc=colour if reached else "white",
                )
            if column == "uis":
                axis.axvline(
                    spread(found["retrained"], "uis")[0], color="0.45", linestyle="--", linewidth=1
                )
            axis.set(xlabel=f"{label} (lower is better)", xlim=(0, None))
            axis.set_yticks(range(len(order)), order if axis is row[0] else [])
            axis.grid(axis="x", alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_title(
            f"{request}-task: forget from {', '.join(targets)}", loc="left", fontsize=10
        )
    figure.suptitle(
        f"Unlearning on {result['data']}, {len(result['seeds'])} seeds "
        "(hollow: did not forget enough; dashed: retrained)",
        fontsize=11,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)
