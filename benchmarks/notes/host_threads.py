"""A training step on the CPU beside a factorisation of a Gram matrix: by numpy, by torch, and alone.

    python -m benchmarks.notes.host_threads [--quick]

A line per number of rows: the step's time after numpy's Cholesky factorisation, and after torch's, over
the same step's after nothing; medians of rounds. Above 1, threads of numpy spin on the step's cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch

from benchmarks.measure import keep_heap
from benchmarks.models import build
from benchmarks.peers.ways import plain

ROWS = (32, 64, 96, 128, 192)


def after(between: Callable[[], object], step: Callable[[], object], rounds: int) -> float:
    """The median time of a step that follows something else."""
    times = []
    for _ in range(rounds):
        between()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return median(times)


def ratios(rows: int, step: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The step's time after numpy and after torch, over that after nothing."""
    J = torch.randn(rows, 2 * rows, dtype=torch.float64)
    G = J @ J.T
    # the threads of one go to sleep before the next is measured
    found = []
    for between in (
        lambda: None,
        lambda: np.linalg.cholesky(G.numpy()),
        lambda: torch.linalg.cholesky_ex(G),
    ):
        time.sleep(0.2)
        found.append(after(between, step, rounds))
    alone, numpy, own = found
    return numpy / alone, own / alone


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small step, to see that it runs")
    quick = parser.parse_args(argv).quick
    keep_heap()
    step = plain(build("mlp", 1, quick)).step
    for rows in ROWS[:1] if quick else ROWS:
        numpy, own = ratios(rows, step, 2 if quick else 41)
        print(f"{rows:4} rows: after numpy's {numpy:.2f}, after torch's {own:.2f}")


if __name__ == "__main__":
    main()
