"""What a run gains that goes on at the level: UIS on validation data of seed 0, by how it goes on.

    python -m benchmarks.notes.settling [--data {digits,rooms}] [--methods OrthoGrad,...] [--orders 3] [--quick]

    at once      the run ends at its first evaluation at the level
    same rate    it goes on to its last step at the rate that led there
    falling, K   at rates that fall to zero within K steps, or by the last one

With levels throughout, full request, the first rate of the method's settings for runs that settle times
1 and 3; means over orders of batches. Of what goes on, the evaluation at the level that is lowest.
"""

from __future__ import annotations

import argparse
from statistics import fmean

from benchmarks import cases, protocol
from benchmarks.cases import Case, Choice, settled
from benchmarks.methods import METHODS, OURS
from benchmarks.requests import Request, arrange
from benchmarks.settling import Rate, Settling
from benchmarks.training import train
from benchmarks.unlearning_jobs import aim, levels
from benchmarks.unlearning_records import SEARCHED, Attempt, Mode
from mtu_fast.unlearning.loop.settling import falling


def same(step: int, begun: int, last: int) -> float:
    """The rate that led there."""
    return 1.0


def falling_within(count: int) -> Rate:
    """To zero within so many steps, or by the last one."""

    def rate(step: int, begun: int, last: int) -> float:
        return max(0.0, falling(step, begun, min(begun + count, last)))

    return rate


WAYS: dict[str, Rate | None] = {
    "at once": None,
    "same rate": same,
    "falling, 60": falling_within(60),
    "falling, 120": falling_within(120),
    "falling, the rest": falling,
}


def table(case: Case, choice: Choice, names: list[str], orders: int) -> dict[str, list[float]]:
    """{method and rate: UIS on validation data of each of `WAYS`}; NaN where the level was not reached."""
    problem, request = case.problem, Request()
    (parts,) = arrange(cases.parts(choice, SEARCHED), request, problem, SEARCHED)
    model = train(problem, parts["train"], case.protocol, SEARCHED, lambda done: None)
    targets = request.targets(problem)
    held_out = protocol.HeldOut(problem, model, parts, targets)
    found: dict[str, list[float]] = {}
    for name in names:
        grid = case.protocol.grids[settled(METHODS[name].family)]
        for alpha, lr in dict.fromkeys((grid[0], grid[len(grid) // 2])):
            line = found.setdefault(f"{name}, rate {lr:g}", [])
            for rule in WAYS.values():
                uis = []
                for order in range(orders):
                    attempt = Attempt(request, name, Mode.LEVELS, SEARCHED, alpha, lr)
                    settling = (
                        None if rule is None else Settling(held_out, case.protocol.steps, rule)
                    )
                    run = protocol.unlearn(
                        problem, model, parts, targets, METHODS[name], alpha, lr, aim(case, model, parts, attempt),
                        case.protocol, order, lambda done: None, levels=levels(case, model, parts, attempt),
                        settling=settling,
                    )  # fmt: skip
                    if run.reached:
                        uis.append(held_out.of(run))
                line.append(fmean(uis) if len(uis) == orders else float("nan"))
    return found


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=("digits", "rooms"), default="rooms")
    parser.add_argument("--methods", default=f"OrthoGrad,{OURS},GradDiff,Nash-MTL")
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    choice = Choice(options.data, quick=options.quick)
    case = cases.load(choice)
    found = table(case, choice, options.methods.split(","), options.orders)
    width = max(map(len, found))
    print(" " * width + "".join(f"{way:>19}" for way in WAYS))
    for line, values in found.items():
        print(f"{line:{width}}" + "".join(f"{value:19.2f}" for value in values))
    return found


if __name__ == "__main__":
    main()
