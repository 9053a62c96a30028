"""A one-task step with no rows kept for the weighted sum, and with all of them: time and memory over the plain step.

    python -m benchmarks.notes.memory_budget [--quick]

Rows are compared with an ordinary backward after 1, 2, 4, 8, … steps, so in calls 2, 3, 5, 9, …; the
memory of such a step is printed beside that of an ordinary one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import mtu_fast as mtu
from benchmarks.measure import interleaved, peak_memory
from benchmarks.models import Case, build
from benchmarks.peers.ways import plain

BUDGETS = (0, 2**30)  # bytes
ORDINARY, CHECKED = 0, 1  # calls before those of `peak_memory`, which measures its fourth


def step(case: Case, budget: int) -> Callable[[], object]:
    """A whole OrthoGrad step with that many bytes for rows."""
    engine = mtu.Engine(case.model, params=case.params.values(), memory_budget=budget)

    def run() -> object:
        case.model.zero_grad()
        return engine.backward(case.losses(), mtu.OrthoGrad(0.5), forget=case.forget)

    return run


def prepare(budget: str, quick: str, before: str) -> Callable[[], object]:
    """The step whose memory is measured, in a process of its own; a budget of -1 is the plain step.

    A tiny net goes first, so that the libraries' code is not counted.
    """
    chosen(build("transformer", 1, quick=True), int(budget))()
    case = build("transformer", 1, quick=quick == "True")
    plain(case).step()
    case.model.zero_grad()
    measured = chosen(case, int(budget))
    for _ in range(int(before)):
        measured()
    case.model.zero_grad()
    return measured


def chosen(case: Case, budget: int) -> Callable[[], object]:
    """The plain step for a budget of -1, else ours."""
    return plain(case).step if budget == -1 else step(case, budget)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per budget."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small net, to see that it runs")
    quick = parser.parse_args(argv).quick
    case = build("transformer", 1, quick=quick)
    steps = {"plain": plain(case).step} | {str(b): step(case, b) for b in BUDGETS}
    times = interleaved(steps, 1 if quick else 9)
    base = memory(-1, quick, ORDINARY)
    for budget in BUDGETS:
        ratio, spread = times[str(budget)].ratio(times["plain"])
        ordinary, checked = (memory(budget, quick, calls) / base for calls in (ORDINARY, CHECKED))
        print(f"budget {budget}: time {ratio:.2f} ± {spread:.2f}", end=", ")
        print(f"memory {ordinary:.2f}, of a checked step {checked:.2f}")


def memory(budget: int, quick: bool, before: int) -> float:
    """Peak MiB of a step after so many calls, in a process of its own."""
    name = "benchmarks.notes.memory_budget:prepare"
    return peak_memory(name, str(budget), str(quick), str(before))


if __name__ == "__main__":
    main()
