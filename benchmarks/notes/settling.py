"""What a run gains that goes on at the level: UIS on validation data of seed 0, by how it goes on.

    python -m benchmarks.notes.settling [--data {digits,rooms}] [--methods OrthoGrad,...] [--orders 3] [--quick]

    at once      the run ends at its first evaluation at the level
    same rate    it goes on to its last step at the rate that led there
    falling, K   at rates that fall to zero within K steps, or by the last one

With levels throughout, full request, the first rate of the method's settings for runs that settle times
1 and 3; means over orders of batches. Of what goes on, the evaluation at the level that is lowest, and in
brackets the last one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from torch import nn

from benchmarks import cases, protocol
from benchmarks.cases import Case, Choice, settled
from benchmarks.data import Dataset
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


@dataclass(frozen=True)
class Trials:
    """Runs of one method at one rate, in several orders of batches.

    Attributes:
        case: the data.
        parts: its splits.
        model: the original.
        attempt: the method and its setting.
        orders: how many.
    """

    case: Case
    parts: Mapping[str, Dataset]
    model: nn.Module
    attempt: Attempt
    orders: int

    def mean(self, rule: Rate | None) -> tuple[float, float]:
        """UIS of what the runs came to, and of their last evaluations at the level; NaN where one is not down."""
        found = [self._run(order, rule) for order in range(self.orders)]
        best, last = (fmean(values) for values in zip(*found, strict=True))
        return best, last

    def _run(self, order: int, rule: Rate | None) -> tuple[float, float]:
        case, attempt, model, parts = self.case, self.attempt, self.model, dict(self.parts)
        targets = attempt.request.targets(case.problem)
        held_out = protocol.HeldOut(case.problem, model, parts, targets)
        seen: list[float] = []

        def judge(net: nn.Module, forget: Mapping[str, float]) -> float:
            seen.append(held_out(net, forget))
            return seen[-1]

        run = protocol.unlearn(
            case.problem, model, parts, targets, METHODS[attempt.method], attempt.alpha, attempt.lr,
            aim(case, model, parts, attempt), case.protocol, order, lambda done: None,
            levels=levels(case, model, parts, attempt),
            settling=None if rule is None else Settling(judge, case.protocol.steps, rule),
        )  # fmt: skip
        best = held_out.of(run) if run.reached else math.nan
        return best, seen[-1] if seen else best


def table(
    case: Case, choice: Choice, names: list[str], orders: int
) -> dict[str, list[tuple[float, float]]]:
    """{method and rate: (best, last) of each of `WAYS`}."""
    request = Request()
    (parts,) = arrange(cases.parts(choice, SEARCHED), request, case.problem, SEARCHED)
    model = train(case.problem, parts["train"], case.protocol, SEARCHED, lambda done: None)
    found = {}
    for name in names:
        grid = case.protocol.grids[settled(METHODS[name].family)]
        for alpha, lr in dict.fromkeys((grid[0], grid[len(grid) // 2])):
            attempt = Attempt(request, name, Mode.LEVELS, SEARCHED, alpha, lr)
            trials = Trials(case, parts, model, attempt, orders)
            found[f"{name}, rate {lr:g}"] = [trials.mean(rule) for rule in WAYS.values()]
    return found


def main(arguments: list[str] | None = None) -> dict[str, list[tuple[float, float]]]:
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
        print(
            f"{line:{width}}"
            + "".join(f"{f'{best:.2f} ({last:.2f})':>19}" for best, last in values)
        )
    return found


if __name__ == "__main__":
    main()
