"""The table of all cases, and the CSV that their measurements are appended to."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.ops import complementary, gram, gram_schmidt, grouped, project
from benchmarks.ops.case import Case

SIZES = ("quick", "cpu", "cuda")


def cases(size: str) -> list[Case]:
    """Every case of one size: "quick" (does it run), "cpu" or "cuda" (how fast)."""
    modules = (gram, grouped, gram_schmidt, project, complementary)
    return [case for module in modules for case in module.cases(size)]


@dataclass(frozen=True)
class Row:
    """One implementation of one case in one run; what was not measured is empty, and `note` says why.

    Attributes:
        seconds: median over rounds.
        ratio: this time over the reference's in the same round, the median over rounds; above 1 is
            slower.
        ratio_spread: half the distance between the quartiles of that.
        floor_seconds: what bytes and FLOPs cost at least on this machine (`benchmarks/floor.py`).
        fraction_of_floor: floor over time; 1 is the machine's limit.
        error: relative to float64 arithmetic on the same inputs; empty for parts, which compute
            something else.
    """

    date: str
    device: str
    threads: int
    op: str
    case: str
    implementation: str
    seconds: float | None
    ratio: float | None
    ratio_spread: float | None
    floor_seconds: float | None
    fraction_of_floor: float | None
    error: float | None
    note: str
    torch: str
    triton: str
    python: str
    mtu_fast: str
    commit: str


COLUMNS = [field.name for field in fields(Row)]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to the CSV, which is begun with a line of column names where there is none.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_header(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in asdict(row).items()} for row in rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV written by `append`, oldest first.

    Raises:
        ValueError: the file has other columns.
    """
    _check_header(path)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _check_header(path: Path) -> None:
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if found != COLUMNS:
        raise ValueError(
            f"{path} has the columns {found}, expected {COLUMNS}; move the file away to begin a new one."
        )


def _cell(value: object) -> object:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value
