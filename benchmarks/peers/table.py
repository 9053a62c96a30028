"""The newest rows of `benchmarks/results/peers.csv` as one table: everyone's time and memory over the plain step's.

    python -m benchmarks.peers.table [--csv PATH]

A line a case, a column a way.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers.run import CSV
from benchmarks.peers.ways import PEERS

Row = Mapping[str, str]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a case, a column a way; "time, memory", "-" where it cannot or was not measured."""
    newest = {
        (row["model"], int(row["tasks"]), int(row["samples"]), row["way"]): row for row in rows
    }
    models = list(dict.fromkeys(model for model, *_ in newest))
    cases = sorted(
        {key[:3] for key in newest}, key=lambda case: (case[1], models.index(case[0]), case[2])
    )
    lines = [
        "| model | tasks | N | " + " | ".join(PEERS) + " |",
        "|---|---:|---:|" + "---:|" * len(PEERS),
    ]
    for case in cases:
        cells = [_cell(newest.get((*case, way), {})) for way in PEERS]
        lines.append(f"| {' | '.join(map(str, case))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    figures = [row.get(name, "") for name in ("step_ratio", "step_mib_ratio")]
    return ", ".join(_short(float(figure)) for figure in figures if figure) or "-"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=CSV)
    with parser.parse_args(argv).csv.open(newline="") as file:
        print(table(list(csv.DictReader(file))))


if __name__ == "__main__":
    main()
