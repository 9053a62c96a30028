"""Where the time of an OrthoGrad step goes: its phases over the plain training step, and torch's ops in each.

    python -m benchmarks.phases [--models transformer resnet] [--tasks 1 3] [--samples N] [--repeats
                                K] [--ops COUNT] [--quick]

    forward   the losses
    rows      one data-gradient pass a task, and the rows that are kept
    gram      G = J Jᵀ, and the rows that it alone needs
    weights   the method's, from G
    combine   d = Jᵀ w

A phase's figure is the median over rounds of its time over that of the plain step in the same
round. The ops are those of one more step under torch's profiler, by the time spent in themselves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch.profiler import ProfilerActivity, profile

import mtu_fast as mtu
from benchmarks.models import MODELS, Case, Sizes, build
from benchmarks.peers.base import ALPHA
from benchmarks.peers.ways import plain

T = TypeVar("T")
PHASES = ("forward", "rows", "gram", "weights", "combine")


class Phase(NamedTuple):
    """One phase of a step; `ops`: (name, ms, calls), most ms first."""

    name: str
    ms: float
    ratio: float
    ops: list[tuple[str, float, int]]


class Watch(Protocol):
    """Calls, and returns what the call returns."""

    def __call__(self, name: str, call: Callable[[], T]) -> T: ...


def walk(case: Case, engine: mtu.Engine, watch: Watch) -> None:
    """One step, phase by phase."""
    method = mtu.OrthoGrad(alpha=ALPHA)
    case.model.zero_grad()
    losses = watch("forward", case.losses)
    rows = watch("rows", lambda: engine.rows(losses, forget=case.forget))
    G = watch("gram", rows.gram)
    w = watch("weights", lambda: method(G, rows.roles))
    watch("combine", lambda: rows.vjp(w))


def phases(case: Case, repeats: int) -> tuple[float, list[Phase]]:
    """The plain step's median ms, and the phases of ours."""
    engine, base = mtu.Engine(case.model, params=case.params.values()), plain(case).step
    ms: dict[str, list[float]] = {name: [] for name in ("plain", *PHASES)}
    ops: dict[str, list[tuple[str, float, int]]] = {}

    def clocked(name: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = call()
        ms[name].append((time.perf_counter() - start) * 1e3)
        return result

    def profiled(name: str, call: Callable[[], T]) -> T:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            result = call()
        spent = [(e.key, e.self_cpu_time_total / 1e3, e.count) for e in seen.key_averages()]
        ops[name] = sorted(spent, key=lambda op: -op[1])
        return result

    for _ in range(repeats + 1):
        clocked("plain", base)
        walk(case, engine, clocked)
    walk(case, engine, profiled)
    of_round = {name: times[1:] for name, times in ms.items()}  # the first round finds the plan
    ratios = {
        n: [a / b for a, b in zip(times, of_round["plain"], strict=True)]
        for n, times in of_round.items()
    }
    found = [
        Phase(n, statistics.median(of_round[n]), statistics.median(ratios[n]), ops[n])
        for n in PHASES
    ]
    return statistics.median(of_round["plain"]), found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the arguments ask for and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=["mlp", "transformer", "resnet"]
    )
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--samples", type=int, help="N; by default the model's own")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--ops", type=int, default=4, help="ops to name a phase")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models: does it run, not how fast"
    )
    args = parser.parse_args(argv)
    if (
        min(*args.tasks, 1 if args.samples is None else args.samples, args.repeats) < 1
        or args.ops < 0
    ):
        parser.error("--tasks, --samples and --repeats take numbers from 1, --ops from 0")
    for model in args.models:
        for tasks in args.tasks:
            ms, found = phases(
                build(model, tasks, args.quick, sizes=Sizes(args.samples)), args.repeats
            )
            whole = sum(phase.ratio for phase in found)
            print(
                f"{model}, {tasks} task(s): plain step {ms:.1f} ms, phases together {whole:.2f} of it"
            )
            for phase in found:
                named = ", ".join(
                    f"{name} {spent:.1f} ms x{calls}"
                    for name, spent, calls in phase.ops[: args.ops]
                )
                print(f"  {phase.name:8} {phase.ms:8.1f} ms {phase.ratio:6.2f}   {named}")


if __name__ == "__main__":
    main()
