"""What the unlearning demo shows: its one table as text, and the plot of forget and retain scores over steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# told apart without colour vision too
COLOURS = {"OrthoGrad": "#0072b2", "GradDiff": "#e69f00", "Ascent": "#b5267a"}
STYLES = {"OrthoGrad": "-", "GradDiff": "--", "Ascent": "-."}
SPLITS = ("forget", "retain", "test")

# ---- the table -----------------------------------------------------------------------------------


def text_table(result: Mapping[str, Any]) -> str:
    """The result of the demo as one plain-text table: a block a request, a line a model, scores in percent."""
    first = next(iter(result["requests"].values()))
    tasks = list(first["models"]["original"]["scores"]["test"])
    groups = "".join(f" |{task + ' (mIoU)' if task == 'mask' else task:^21}" for task in tasks)
    head = "".join(" |" + "".join(f"{split:>7}" for split in SPLITS) for _ in tasks)
    tail = f" |{'UIS':>6}{'gap':>6}{'ToW':>6} |{'steps':>6} |{'ms a step':>15} |{'peak MiB':>14}"
    over = f" |{'':18} |{'':6} |{'fast':>7}{'ref.':>8} |{'fast':>7}{'ref.':>7}"
    lines = [f"{'':11}{groups}{over}", f"{'':11}{head}{tail}"]
    rule = "-" * len(lines[1])
    for request, block in result["requests"].items():
        lines += [rule, f"{request}-task: forget from {', '.join(block['targets'])}"]
        lines += [_line(name, row, tasks) for name, row in block["models"].items()]
    notes = (
        "Scores in percent: accuracy; mask: mean IoU. ! forgot more than the retrained model (over-forgetting).",
        "UIS (lower is better) is against the original; gap (mean, points) and ToW (1 is best) against the retrained.",
        "steps*: the step limit came before the forget score had fallen to that of validation scenes. -: not measured.",
    )
    return "\n".join([*lines, rule, *notes])


def _line(name: str, row: Mapping[str, Any], tasks: list[str]) -> str:
    cells = []
    for task in tasks:
        flag = "!" if task in row["over_forgotten"] else " "
        forget, retain, test = (100 * row["scores"][split][task] for split in SPLITS)
        cells.append(f" |{forget:6.1f}{flag}{retain:7.1f}{test:7.1f}")
    scores = f" |{row['uis']:6.1f}{100 * row['mean_gap']:6.1f}{row['tow']:6.2f}"
    if "chosen" not in row:
        return f"{name:11}{''.join(cells)}{scores} |{'':6} |{'':15} |"
    steps = f"{row['chosen']['steps']:5}{' ' if row['chosen']['reached'] else '*'}"
    ms = f"{row['ms']['fast']:7.1f}{row['ms']['reference']:8.1f}"
    mib = "".join(f"{'-' if value is None else f'{value:.1f}':>7}" for value in row["mib"].values())
    return f"{name:11}{''.join(cells)}{scores} |{steps} |{ms} |{mib}"


# ---- the plot ------------------------------------------------------------------------------------


def plot_unlearning(result: Mapping[str, Any], path: Path) -> None:
    """Forget and retain scores over steps, and one against the other: a row a request, a line a method; to a PNG."""
    requests = result["requests"]
    size = (13, 3.7 * len(requests))
    figure, axes = plt.subplots(len(requests), 3, figsize=size, squeeze=False, layout="constrained")
    for row, (request, block) in zip(axes, requests.items(), strict=True):
        forget, retain, trade = row
        for name, colour in COLOURS.items():
            history = block["models"][name]["history"]
            steps = [entry["step"] for entry in history]
            gone, kept = _curves(history, block["targets"])
            style = {"color": colour, "linestyle": STYLES[name], "linewidth": 1.8, "label": name}
            for axis, x, y in ((forget, steps, gone), (retain, steps, kept), (trade, gone, kept)):
                axis.plot(x, y, **style)
                axis.plot(x[-1], y[-1], "o", color=colour, markersize=5)
        _references(row, block)
        what = "all tasks" if request == "full" else ", ".join(block["targets"])
        forget.set(
            title=f"{request}-task: to forget ({what})",
            xlabel="step",
            ylabel="score on what is forgotten",
        )
        also = "" if request == "full" else "\nand on the forget scenes' other tasks"
        retain.set(title="to keep", xlabel="step", ylabel=f"score on retain scenes{also}")
        trade.set(title="one against the other", xlabel="forgotten  (forget score, falling to the right)",
                  ylabel="kept  (retain score)")  # fmt: skip
        trade.invert_xaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        "Unlearning handwritten digits: a run stops where the forget score is that of scenes never seen"
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _curves(
    history: list[Mapping[str, Any]], targets: list[str]
) -> tuple[list[float], list[float]]:
    """(mean forget score of the targets, mean score of all that is to be kept), in percent, over the history."""
    gone = [_percent(entry["forget"][task] for task in targets) for entry in history]
    return gone, [_percent(_kept(entry, targets)) for entry in history]


def _kept(entry: Mapping[str, Any], targets: list[str]) -> list[float]:
    return [
        *entry["retain"].values(),
        *(score for task, score in entry["forget"].items() if task not in targets),
    ]


def _percent(values: Any) -> float:
    scores = list(values)
    return 100 * sum(scores) / len(scores)


def _references(row: Any, block: Mapping[str, Any]) -> None:
    """The level at which a run stops, and where the retrained model stands."""
    forget, retain, trade = row
    scores, targets = block["models"]["retrained"]["scores"], block["targets"]
    gone, kept = (
        _percent(scores["forget"][task] for task in targets),
        _percent(_kept(scores, targets)),
    )
    level = 100 * block["level"]
    grey = {"color": "0.45", "linewidth": 1}
    forget.axhline(level, linestyle=":", label="stop (score on validation scenes)", **grey)
    forget.axhline(gone, linestyle=(0, (6, 3)), label="retrained without them", **grey)
    retain.axhline(kept, linestyle=(0, (6, 3)), **grey)
    trade.axvline(level, linestyle=":", **grey)
    trade.plot(gone, kept, "*", color="0.2", markersize=12, zorder=5)
    trade.annotate(
        "retrained",
        (gone, kept),
        xytext=(0, -14),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    for axis in row:
        _clean(axis)


def _clean(axis: Axes) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
