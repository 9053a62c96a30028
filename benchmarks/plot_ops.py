"""A plot per op from the CSV of `python -m benchmarks.ops`: time against the floor and against the reference.

    python -m benchmarks.plot_ops [--csv PATH] [--out FOLDER]

One row of axes a device (and number of threads): the newest row of each case and implementation
counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.measure import ROOT
from benchmarks.ops.table import read

RESULTS = ROOT / "benchmarks" / "results"
COLOURS = {"kernel": "#0072b2", "reference": "#e69f00"}  # told apart without colour vision too
OTHERS = ["#b5267a", "#009e73", "#56b4e9", "0.55", "#d55e00"]

Latest = dict[str, dict[str, Mapping[str, str]]]  # {case: {implementation: row}}


def plot_ops(csv: Path, folder: Path) -> list[Path]:
    """Write `ops_<op>.png` for every op with times in the CSV; returns the files.

    Raises:
        ValueError: the CSV has other columns, or no times.
    """
    rows = [row for row in read(csv) if row["seconds"]]
    if not rows:
        raise ValueError(f"{csv} holds no times; run `python -m benchmarks.ops` first.")
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _plot(op, rows, folder / f"ops_{op}.png") for op in dict.fromkeys(row["op"] for row in rows)
    ]


def _plot(op: str, rows: Sequence[Mapping[str, str]], path: Path) -> Path:
    devices: dict[str, Latest] = {}
    for row in rows:
        if row["op"] == op:
            device = f"{row['device']}, {row['threads']} thread(s)"
            devices.setdefault(device, {}).setdefault(row["case"], {})[row["implementation"]] = row
    names = list(
        dict.fromkeys(
            name for cases in devices.values() for case in cases.values() for name in case
        )
    )
    others = [name for name in names if name not in COLOURS]
    colours = COLOURS | dict(zip(others, OTHERS * len(others), strict=False))
    heights = [
        0.9 + 0.2 * sum(map(len, cases.values())) + 0.25 * len(cases) for cases in devices.values()
    ]
    figure, axes = plt.subplots(len(devices), 2, figsize=(12, 1 + sum(heights)), squeeze=False, layout="constrained",
                                height_ratios=heights)  # fmt: skip
    for (left, right), (device, cases) in zip(axes, devices.items(), strict=True):
        limit = "floor / time  (1: bandwidth and vendor products as measured)"
        _bars(left, cases, colours, "fraction_of_floor", limit, True)
        _bars(right, cases, colours, "ratio", "time / reference's time  (shorter is faster)", False)
        left.set_title(device, loc="left", fontsize=10)
    shown = dict(zip(*axes[0][0].get_legend_handles_labels()[::-1], strict=True))
    for axis in axes[:, 0]:
        shown |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(op)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def _bars(
    axis: Axes, cases: Latest, colours: Mapping[str, Any], column: str, label: str, named: bool
) -> None:
    """A bar for each implementation, cases as groups from the top down."""
    at, ticks = 0.0, []
    for implementations in cases.values():
        first = at
        for name, row in implementations.items():
            if row[column]:
                value = float(row[column])
                axis.barh(at, value, 0.85, color=colours[name], label=name)
                axis.annotate(f" {value:.2f}", (value, at), va="center", fontsize=7)
            at += 1
        ticks.append((first + at - 1) / 2)
        at += 1
    axis.set_yticks(ticks, list(cases) if named else [""] * len(cases), fontsize=8)
    axis.axvline(1, color="0.45", linewidth=1, linestyle=":")
    axis.set_xlabel(label)
    axis.invert_yaxis()
    axis.grid(alpha=0.25, linewidth=0.6, axis="x")
    axis.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> None:
    """Plot what the arguments name.

    Raises:
        SystemExit: wrong arguments, or a CSV that cannot be plotted.
    """
    parser = argparse.ArgumentParser(
        "benchmarks.plot_ops", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "ops.csv")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        print("\n".join(map(str, plot_ops(args.csv, args.out))))
    except (OSError, ValueError) as error:
        raise SystemExit(f"plot_ops: {error}") from error


if __name__ == "__main__":
    main()
