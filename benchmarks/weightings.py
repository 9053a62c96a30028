"""What a method's weights cost on one small Gram matrix on the CPU, beside TorchJD's weightings.

    python -m benchmarks.weightings [--rows 4,8,16,32] [--rounds K] [--threads N]

Rows of which most conflict: random ones less nine tenths of their mean. Microseconds a call, and
the ratio, medians over rounds in which both are timed one after the other; TorchJD's column is
empty where it is not installed, or lacks a package that the weighting asks for. Its CAGrad needs
cvxpy and clarabel; its Nash-MTL, cvxpy and ecos. UPGrad, DualProj and CAGrad of TorchJD add 1e-4
to the diagonal, its MGDA stops at 1e-3.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import mtu_fast as mtu

Call = Callable[[], object]
ROWS = "4,8,16,32"
METHODS: tuple[mtu.Method, ...] = (
    mtu.UPGrad(), mtu.DualProj(), mtu.MGDA(), mtu.CAGrad(), mtu.NashMTL(), mtu.FairGrad(), mtu.IMTLG(),
    mtu.AlignedMTL(), mtu.PCGrad(), mtu.GradVac(),
)  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """Microseconds a call of ours and of TorchJD's, and how ours stands to theirs; None where theirs cannot run."""

    method: str
    rows: int
    ours: float
    theirs: float | None
    ratio: float | None

    def line(self) -> str:
        """A line of the table."""
        if self.theirs is None or self.ratio is None:
            return f"{self.method:12s}{self.rows:5d}{self.ours:11.0f}{'':11s}{'':8s}"
        return (
            f"{self.method:12s}{self.rows:5d}{self.ours:11.0f}{self.theirs:11.0f}{self.ratio:8.2f}"
        )


def problem(R: int, seed: int = 0) -> tuple[Tensor, mtu.Roles]:
    """A Gram matrix [R, R] of conflicting rows, and their roles: all retained."""
    draw = torch.Generator().manual_seed(seed)
    J = torch.randn(R, 100, dtype=torch.float64, generator=draw)
    J = J - 0.9 * J.mean(0)
    index = torch.zeros(R, dtype=torch.int64)
    return J @ J.t(), mtu.Roles(index, index, index, index.double(), ("a",), torch.float64)


def theirs(name: str, R: int) -> Callable[[Tensor], Tensor] | None:
    """TorchJD's weighting of this name for R rows; None where it cannot be had."""
    known: dict[str, dict[str, Any]] = {
        "CAGrad": {"c": 0.5},
        "FairGrad": {"alpha": 2.0},
        "NashMTL": {"n_tasks": R},
    }
    options = known.get(name, {})
    try:
        from torchjd import aggregation

        found: Callable[[Tensor], Tensor]
        if name == "NashMTL":  # no weighting of its own in the public part
            found = aggregation.NashMTL(**options).weighting
        else:
            found = getattr(aggregation, f"{name}Weighting")(**options)
    except ImportError:
        return None
    return found


def timed(method: mtu.Method, R: int, rounds: int) -> Timed:
    """Both on one problem, in turns."""
    name = type(method).__name__
    G, roles = problem(R)
    other = theirs(name, R)
    calls: list[Call] = [lambda: method(G, roles)]
    if other is not None:
        calls.append(lambda: other(G))
    times = interleaved(calls, rounds)
    ours = 1e6 * median(times[0])
    if other is None:
        return Timed(name, R, ours, None, None)
    ratio = median(a / b for a, b in zip(*times, strict=True))
    return Timed(name, R, ours, 1e6 * median(times[1]), ratio)


def interleaved(calls: Sequence[Call], rounds: int) -> list[list[float]]:
    """Seconds of each call in every round, after two rounds that do not count."""
    times: list[list[float]] = [[] for _ in calls]
    for done in range(rounds + 2):
        for call, taken in zip(calls, times, strict=True):
            start = perf_counter()
            call()
            if done >= 2:
                taken.append(perf_counter() - start)
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=ROWS, help="numbers of rows")
    parser.add_argument("--rounds", type=int, default=60, help="rounds a case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    warnings.simplefilter("ignore")  # of solvers, on problems that are hard for them
    print(f"{'method':12s}{'rows':>5s}{'ours, us':>11s}{'TorchJD':>11s}{'ratio':>8s}")
    for method in METHODS:
        for R in map(int, chosen.rows.split(",")):
            print(timed(method, R, chosen.rounds).line())


if __name__ == "__main__":
    main()
