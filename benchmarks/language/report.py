"""The table of the language benchmark as text, and its plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

Rows = list[Mapping[str, Any]]

# column of a row: heading, factor, decimals
COLUMNS: dict[str, tuple[str, float, int]] = {
    "gap": ("gap", 100, 1),
    "em_forget": ("EM F", 100, 0),
    "em_retain": ("EM R", 100, 0),
    "em_general": ("EM G", 100, 0),
    "rouge_forget": ("ROUGE F", 100, 0),
    "rouge_retain": ("ROUGE R", 100, 0),
    "truth_forget": ("truth F", 100, 0),
    "truth_retain": ("truth R", 100, 0),
    "quality": ("KS p", 1, 2),
    "auc": ("MIA", 100, 0),
    "category_forget": ("cat. F", 100, 0),
    "ppl_retain": ("ppl R", 1, 2),
    "ppl_general": ("ppl G", 1, 2),
    "steps": ("steps", 1, 0),
}
NOTES = (
    "Means over seeds. F: facts to forget, R: facts of people to keep, G: of places, never seen in unlearning. gap:",
    "mean distance in points to the retrained model's likelihoods, over F, R, G and people never read, and over tasks.",
    "EM and ROUGE-L: of answers. truth: min(R, 1/R) of the truth ratio R on F (100: it does not know), max(0, 1 − R)",
    "on what is kept (100: it knows). KS p: of the forget truth ratios against the retrained model's. MIA: AUC of",
    "membership inference; the retrained model's is the aim. cat.: accuracy of the category, which the request",
    "birthplace keeps. ppl: perplexity. *: in some seed no setting forgot enough within the steps.",
)
LABELS = {"people": "people, all tasks", "birthplace": "birthplaces, answer and next sentence"}


def groups(result: Mapping[str, Any], request: str) -> dict[tuple[str, str], Rows]:
    """{(mode, method): its rows over seeds}, in the order of the table."""
    found: dict[tuple[str, str], Rows] = {}
    for row in result["rows"]:
        if row["request"] == request:
            found.setdefault((row["mode"], row["method"]), []).append(row)
    return found


def requests(result: Mapping[str, Any]) -> list[str]:
    """The requests, in the order of the table."""
    return list(dict.fromkeys(row["request"] for row in result["rows"]))


def name_of(mode: str, method: str) -> str:
    """A method as the table names it."""
    return method if mode == "full" else f"{method}, LoRA"


def mean(rows: Rows, column: str) -> float:
    """Mean over seeds."""
    return statistics.fmean(row[column] for row in rows)


def reached(rows: Rows) -> bool:
    """Whether every seed forgot enough."""
    return all(row.get("reached", True) for row in rows)


def cells(rows: Rows) -> list[str]:
    """The columns of a line; empty where a reference has none."""
    found = []
    for column, (_, factor, decimals) in COLUMNS.items():
        there = column in rows[0]
        found.append(f"{factor * mean(rows, column):.{decimals}f}" if there else "")
    return found


def text(result: Mapping[str, Any]) -> str:
    """The result as one plain-text table: a block a request, a line a method."""
    names = [name_of(*key) for request in requests(result) for key in groups(result, request)]
    width = 3 + max(map(len, names))
    head = f"{'':{width}}" + "".join(f"{heading:>9}" for heading, _, _ in COLUMNS.values())
    lines = [head]
    for request in requests(result):
        lines += ["-" * len(head), f"forget {LABELS[request]}"]
        for key, rows in groups(result, request).items():
            name = name_of(*key) + ("" if reached(rows) else "*")
            lines.append(f"{name:{width}}" + "".join(f"{cell:>9}" for cell in cells(rows)))
    made = f"{result['processor_minutes']:.1f} minutes of one processor, all seeds together."
    return "\n".join([*lines, "-" * len(head), *NOTES, made])


def plot(result: Mapping[str, Any], path: Path) -> None:
    """What is still answered of F against what is of R, a panel a request; to a PNG."""
    asked = requests(result)
    figure, axes = plt.subplots(
        1, len(asked), figsize=(5.6 * len(asked), 4.6), squeeze=False, layout="constrained"
    )
    for axis, request in zip(axes[0], asked, strict=True):
        _panel(axis, groups(result, request))
        axis.set_title(f"forget {LABELS[request]}", loc="left", fontsize=10)
    figure.suptitle(
        "A small Llama that forgets (filled: full fine-tuning, hollow: LoRA)", fontsize=11
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _panel(axis: Any, found: Mapping[tuple[str, str], Rows]) -> None:
    methods: Sequence[str] = list(dict.fromkeys(method for _, method in found))
    for (mode, method), rows in found.items():
        colour = f"C{methods.index(method)}"
        x, y = (100 * mean(rows, column) for column in ("truth_forget", "em_retain"))
        face = colour if mode == "full" else "white"
        marker = "*" if method in ("original", "retrained") else "o"
        label = method if mode == "full" else None
        axis.plot(x, y, marker, color=colour, mfc=face, markersize=9, label=label)
    axis.set(
        xlabel="truth ratio of what is to be forgotten (100: not known)",
        ylabel="exact answers about what is kept, %",
        xlim=(0, 100),
        ylim=(0, 103),
    )
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
