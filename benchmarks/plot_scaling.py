"""Plots of `benchmarks/results/scaling.csv`: time and memory of everyone's step against N, T, S and width.

    python -m benchmarks.plot_scaling [--csv PATH] [--out FOLDER]

A column of axes a size: above the time of a step over the plain one on the same batch, below the
peak memory over the plain step's. The sizes that do not vary are those of `scaling.BASE`.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from benchmarks.plot_peers import RESULTS, Row, curves, finish
from benchmarks.scaling import BASE

LABELS = {
    "samples": "N samples",
    "tasks": "T tasks",
    "positions": "S tokens",
    "width": "d features",
}


def plot_scaling(path: Path, folder: Path) -> Path:
    """Write `scaling.png`; returns it.

    Raises:
        ValueError: the CSV holds no times.
    """
    with path.open(newline="") as file:
        rows: list[Row] = [row for row in csv.DictReader(file) if row["ms"]]
    if not rows:
        raise ValueError(f"{path} holds no times; run `python -m benchmarks.scaling` first.")
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(
        2, len(BASE), figsize=(2.9 * len(BASE), 6), squeeze=False, layout="constrained"
    )
    rows = _over_plain(rows)
    for column, axis in enumerate(BASE):
        along = [
            r
            for r in rows
            if all(int(r[other]) == at for other, at in BASE.items() if other != axis)
        ]
        curves(axes[0, column], along, axis, "ratio")
        curves(axes[1, column], along, axis, "memory")
        axes[0, column].set_title(LABELS[axis])
    axes[0, 0].set_ylabel("time of a step / plain step")
    axes[1, 0].set_ylabel("peak memory / plain step's")
    return finish(
        figure,
        "OrthoGrad step of a transformer over the plain step",
        rows[-1],
        folder / "scaling.png",
    )


def _over_plain(rows: Sequence[Row]) -> list[Row]:
    plain = {tuple(r[axis] for axis in BASE): r["mib"] for r in rows if r["way"] == "plain"}
    found: list[Row] = []
    for row in rows:
        base = plain.get(tuple(row[axis] for axis in BASE))
        found.append({
            **row,
            "memory": f"{float(row['mib']) / float(base):.4g}" if base and row["mib"] else "",
        })
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Draw and say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "scaling.csv")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    print(plot_scaling(args.csv, args.out))


if __name__ == "__main__":
    main()
