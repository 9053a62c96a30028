"""What a method's weights cost on small Gram matrices on the CPU, beside TorchJD's weightings or another tree's.

    python -m benchmarks.weightings [--rows 4,8,16,32] [--kinds all] [--layers 1,6,60] [--base TREE]

Rows of which most conflict: random ones less nine tenths of their mean; `--kinds` names others, and
`--layers` batches of so many matrices. Microseconds a call, and the ratio, medians over rounds in
which both are timed one after the other. TorchJD's column is empty where it is not installed, takes
no batch, fails, or lacks a package that the weighting asks for. Its CAGrad needs cvxpy and
clarabel; its Nash-MTL, cvxpy and ecos. UPGrad, DualProj and CAGrad of TorchJD add 1e-4 to the
diagonal, its MGDA stops at 1e-3. With `--base`, a folder with a checkout of another revision, its
methods are timed in a process of their own instead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import mtu_fast as mtu

Call = Callable[[], object]
ROWS = "4,8,16,32"
LONGEST = 2.0  # seconds a case
MOST = 60 * 48**3  # numbers in UPGrad's batch of problems
METHODS: tuple[mtu.Method, ...] = (
    mtu.UPGrad(), mtu.DualProj(), mtu.MGDA(), mtu.CAGrad(), mtu.NashMTL(), mtu.FairGrad(), mtu.IMTLG(),
    mtu.AlignedMTL(), mtu.PCGrad(), mtu.GradVac(),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A method on `layers` matrices of so many rows of one kind."""

    method: str
    kind: str
    rows: int
    layers: int

    def call(self) -> Call:
        """What is timed."""
        method = {type(known).__name__: known for known in METHODS}[self.method]
        G, roles = self.gram(), roles_of(self.rows)
        return lambda: method(G, roles)

    def gram(self) -> Tensor:
        """[R, R], or [layers, R, R] of several."""
        if self.layers == 1:
            return gram(self.kind, self.rows)
        return torch.stack([gram(self.kind, self.rows, seed) for seed in range(self.layers)])

    def line(self, times: Sequence[Sequence[float]]) -> str:
        """A line of the table from the seconds of ours, and of theirs if there are any."""
        name = f"{self.method:12s}{self.kind:12s}{self.layers:7d}{self.rows:5d}"
        ours = f"{1e6 * median(times[0]):11.0f}"
        if len(times) == 1:
            return name + ours
        ratio = median(a / b for a, b in zip(*times, strict=True))
        return f"{name}{ours}{1e6 * median(times[1]):11.0f}{ratio:8.2f}"


class Served:
    """Another tree's methods, in a process of their own; used as a context."""

    def __init__(self, tree: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.path.abspath(tree)}
        command = [sys.executable, "-W", "ignore", __file__, "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def seconds(self, case: Case) -> float:
        """One call there; the first of a case prepares it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(case.method, case.kind, case.rows, case.layers, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def serve() -> None:
    """Times the cases named on the input, a line each, one call a line."""
    call: Call = int
    last = ""
    for line in sys.stdin:
        if line != last:
            method, kind, rows, layers = line.split()
            call = Case(method, kind, int(rows), int(layers)).call()
            last = line
        print(seconds(call), flush=True)


def seconds(call: Call) -> float:
    """Of one call."""
    start = perf_counter()
    call()
    return perf_counter() - start


def gram(kind: str, R: int, seed: int = 0) -> Tensor:
    """A Gram matrix [R, R] of rows of this kind."""
    J = KINDS[kind](R, torch.Generator().manual_seed(seed))
    return J @ J.t()


def _normal(rows: int, width: int, draw: torch.Generator) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=draw)


def conflicting(R: int, draw: torch.Generator) -> Tensor:
    """Rows [R, P] of which most conflict."""
    J = _normal(R, max(100, 2 * R), draw)
    return J - 0.9 * J.mean(0)


def ill(R: int, draw: torch.Generator) -> Tensor:
    """Rows with singular values over three decades."""
    values = torch.logspace(0, -3, R, dtype=torch.float64)
    return (_normal(R, R, draw) * values) @ _normal(R, 2 * R, draw)


def dependent(R: int, draw: torch.Generator) -> Tensor:
    """Rows of half the rank."""
    rank = max(R // 2, 1)
    return _normal(R, rank, draw) @ _normal(rank, 2 * R, draw)


def duplicate(R: int, draw: torch.Generator) -> Tensor:
    """Conflicting rows, each of them twice."""
    return conflicting((R + 1) // 2, draw).repeat(2, 1)[:R]


def zero(R: int, draw: torch.Generator) -> Tensor:
    """Conflicting rows and a zero row."""
    J = conflicting(R, draw)
    J[R // 2] = 0.0
    return J


KINDS = {
    "conflicting": conflicting,
    "ill": ill,
    "dependent": dependent,
    "duplicate": duplicate,
    "zero": zero,
}


def roles_of(R: int) -> mtu.Roles:
    """R retained rows of one task."""
    index = torch.zeros(R, dtype=torch.int64)
    return mtu.Roles(index, index, index, index.double(), ("a",), torch.float64)


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


def beside_torchjd(case: Case, rounds: int) -> list[list[float]]:
    """Seconds of ours and of TorchJD's in every round; ours alone where it has none."""
    ours = case.call()
    other = theirs(case.method, case.rows) if case.layers == 1 else None
    if other is None:
        return interleaved([lambda: seconds(ours)], rounds)
    G = case.gram()
    try:
        return interleaved([lambda: seconds(ours), lambda: seconds(lambda: other(G))], rounds)
    except (ArithmeticError, RuntimeError, ValueError):  # its solvers, on singular matrices
        return interleaved([lambda: seconds(ours)], rounds)


def beside_base(case: Case, base: Served, rounds: int) -> list[list[float]]:
    """Seconds of this tree and of the base in every round."""
    ours = case.call()
    return interleaved([lambda: seconds(ours), lambda: base.seconds(case)], rounds)


def interleaved(timers: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Seconds by each in every round, after two rounds that do not count; fewer rounds of what takes long."""
    first = sum(timer() for timer in timers)
    rounds = max(3, min(rounds, int(LONGEST / first)))
    times: list[list[float]] = [[] for _ in timers]
    for done in range(rounds + 1):
        for timer, taken in zip(timers, times, strict=True):
            value = timer()
            if done:
                taken.append(value)
    return times


def cases(kinds: str, layers: str, rows: str) -> Iterator[Case]:
    """All that were asked for, without UPGrad's that take gigabytes and GradVac's batches, which it refuses."""
    named = list(KINDS) if kinds == "all" else kinds.split(",")
    for method in METHODS:
        name = type(method).__name__
        for kind, count, R in product(named, layers.split(","), rows.split(",")):
            case = Case(name, kind, int(R), int(count))
            if name == "GradVac" and case.layers > 1:
                continue
            if name == "UPGrad" and case.layers * case.rows**3 > MOST:
                continue
            yield case


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=ROWS, help="numbers of rows")
    parser.add_argument("--kinds", default="conflicting", help=f"all, or of {', '.join(KINDS)}")
    parser.add_argument("--layers", default="1", help="matrices of a batch")
    parser.add_argument("--base", help="a checkout of another revision, instead of TorchJD")
    parser.add_argument("--rounds", type=int, default=60, help="most rounds a case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    warnings.simplefilter("ignore")  # of solvers, on problems that are hard for them
    if chosen.serve:
        serve()
        return
    other = "base" if chosen.base else "TorchJD"
    print(
        f"{'method':12s}{'kind':12s}{'layers':>7s}{'rows':>5s}{'ours, us':>11s}{other:>11s}{'ratio':>8s}"
    )
    with ExitStack() as stack:
        base = stack.enter_context(Served(chosen.base)) if chosen.base else None
        for case in cases(chosen.kinds, chosen.layers, chosen.rows):
            if base is None:
                times = beside_torchjd(case, chosen.rounds)
            else:
                times = beside_base(case, base, chosen.rounds)
            print(case.line(times), flush=True)


if __name__ == "__main__":
    main()
