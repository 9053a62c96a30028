"""A plot per number of tasks from `benchmarks/results/peers.csv`: time and memory of everyone's step against N.

    python -m benchmarks.plot_peers [--csv PATH] [--out FOLDER]

A column of axes a model: above the time of a whole step over the plain one, below the peak memory.
The newest row of each way and case counts; what could not run is missing.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.measure import ROOT

RESULTS = ROOT / "benchmarks" / "results"
COLOURS = {
    "mtu_fast": "#0072b2", "TorchJD autogram": "#e69f00", "vmap(grad), J kept": "#b5267a", "vmap(grad), QR": "#009e73",
    "Opacus": "#56b4e9", "BackPACK": "#d55e00", "loop over samples": "0.55",
}  # fmt: skip
FIGURES = {
    "step_ratio": "time of a step / plain step",
    "step_mib_ratio": "peak memory / plain step's",
}
Row = Mapping[str, str]


def plot_peers(path: Path, folder: Path) -> list[Path]:
    """Write `peers_<T>_tasks.png` for every number of tasks in the CSV; returns the files.

    Raises:
        ValueError: the CSV holds no times.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["step_ms"] and row["way"] in COLOURS]
    if not rows:
        raise ValueError(f"{path} holds no times; run `python -m benchmarks.peers.run` first.")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = dict.fromkeys(row["tasks"] for row in rows)
    found = {tasks: [row for row in rows if row["tasks"] == tasks] for tasks in numbers}
    return [
        _plot(mine, folder / f"peers_{_tasks(tasks).replace(' ', '_')}.png")
        for tasks, mine in found.items()
    ]


def _tasks(number: str) -> str:
    return f"{number} task{'s' * (number != '1')}"


def _plot(rows: Sequence[Row], path: Path) -> Path:
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        2, len(models), figsize=(2.9 * len(models), 6), squeeze=False, layout="constrained"
    )
    for column, model in enumerate(models):
        for line, (figure_name, label) in enumerate(FIGURES.items()):
            at = axes[line, column]
            curves(at, [row for row in rows if row["model"] == model], "samples", figure_name)
            if column == 0:
                at.set_ylabel(label)
        axes[0, column].set_title(model)
        axes[1, column].set_xlabel("N")
    return finish(
        figure, f"OrthoGrad step over the plain step, {_tasks(rows[0]['tasks'])}", rows[-1], path
    )


def curves(at: Axes, rows: Sequence[Row], x: str, y: str) -> None:
    """One line a way, of the newest row for every x, both axes logarithmic; a dotted line at 1."""
    for way, colour in COLOURS.items():
        newest = {int(r[x]): r for r in rows if r["way"] == way}
        points = sorted((n, float(r[y])) for n, r in newest.items() if r[y])
        if points:
            at.plot(
                *zip(*points, strict=True),
                "o-",
                color=colour,
                label=way,
                ms=4,
                lw=2 if way == "mtu_fast" else 1,
            )
    at.axhline(1, color="0.7", lw=0.8, ls=":")
    at.set(xscale="log", yscale="log")
    at.set_xticks(ticks := sorted({int(r[x]) for r in rows}), [str(n) for n in ticks], minor=False)
    at.minorticks_off()
    at.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    at.yaxis.set_major_formatter("{x:g}")


def finish(figure: Figure, title: str, row: Row, path: Path) -> Path:
    """Legend, title with the machine of a row, file."""
    lines = {str(line.get_label()): line for at in figure.axes for line in at.get_lines()}
    lines = {way: line for way, line in lines.items() if way in COLOURS}
    columns = min(len(lines), int(figure.get_figwidth() / 1.45))
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{title}: {row['device']}, {row['threads']} thread(s)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Draw and say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "peers.csv")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    for path in plot_peers(args.csv, args.out):
        print(path)


if __name__ == "__main__":
    main()
