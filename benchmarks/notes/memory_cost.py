"""What a full memory adds to a step of OrthoGrad, and what its products take at least.

    python -m benchmarks.notes.memory_cost [--data {digits,rooms,transformer,...}] [--rounds 6] [--budget MiB]

Steps of OrthoGrad and of Levelled OrthoGrad with 4 |R| kept rows take turns on the same batches, one
thread: full requests on data of the unlearning benchmark, or one task of a model of the step
benchmarks. Processor times, medians; the ratio is the median over pairs of neighbouring steps.

The least that a step with a full memory could take: its forward and its rows as factors, measured; the
products of V rows with one another and with K kept ones, where both reach a parameter, at the speed of a
large product in float64; and all explicit rows read twice, for G and for Jᵀ w. Of parameters that are kept
as factors a product of two rows is one of their positions, where that is less, and Jᵀ w a sum over the
positions of all rows, at the speed of a large product in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks import cases, models
from benchmarks.protocol import draw
from mtu_fast._rows.block import Block
from mtu_fast._rows.uses import Gather, Outer, Use
from mtu_fast.unlearning import metrics

BATCHES = 6


class Ready(NamedTuple):
    """What a step is made from: the losses of a forward, whom to forget, and who has a label."""

    losses: dict[str, Tensor]
    mask: Mapping[str, Tensor]
    present: Mapping[str, Tensor] | None


class Sizes(NamedTuple):
    """Of a parameter: V and K, its numbers, those that a product of two rows takes, and those that Jᵀ w adds of a row.

    The last is 0 of explicit rows, which are read.
    """

    own: int
    kept: int
    numbers: int
    product: int
    added: int


class Steps:
    """Steps on some batches of one untrained net, which does not move; `forwards` has one a batch."""

    def __init__(
        self, model: nn.Module, forwards: Sequence[Callable[[], Ready]], budget: int | None
    ) -> None:
        self.model, self.forwards = model, forwards
        self.engines = {kept: mtu.Engine(self.model) for kept in (False, True)}
        self.memory = mtu.Memory(budget=budget)

    def step(self, i: int, kept: bool) -> float:
        """Seconds of a step on batch i, forward included."""
        began = time.process_time()
        self.model.zero_grad()
        losses, mask, there = self.forwards[i]()
        engine = self.engines[kept]
        if kept:
            method = mtu.LevelledOrthoGrad(0.5)
            engine.backward(losses, method, forget=mask, present=there, memory=self.memory)
        else:
            engine.backward(losses, mtu.OrthoGrad(0.5), forget=mask, present=there)
        return time.process_time() - began

    def paired(self, rounds: int) -> list[tuple[float, float]]:
        """(without, with memory) of neighbouring steps, once the memory is full."""
        for _ in range(2):
            for i in range(len(self.forwards)):
                self.step(i, False)
                self.step(i, True)
        order = [i for _ in range(rounds) for i in range(len(self.forwards))]
        return [(self.step(i, False), self.step(i, True)) for i in order]

    def taken(self, i: int) -> float:
        """Seconds of the forward of batch i and of its rows, of which nothing is made."""
        began = time.process_time()
        losses, mask, there = self.forwards[i]()
        self.engines[True].rows(losses, forget=mask, present=there)
        return time.process_time() - began

    def of_parameters(self) -> Iterator[Sizes]:
        """What each parameter's products take: of a step's rows, means of those to forget, and kept rows."""
        mask, block = self.forwards[0]().mask, self.memory.held.block
        assert isinstance(block, Block)
        for j, parameter in enumerate(self.model.parameters()):
            tasks = [t for t in mask if j in block.reached[t]]
            own = sum(int((~mask[t]).sum()) + bool(mask[t].any()) for t in tasks)
            of_tasks = torch.tensor([block.roles.tasks.index(t) for t in tasks])
            kept = int(torch.isin(block.roles.task, of_tasks).sum())
            use = block.pieces[-1].factors.get(j)
            yield Sizes(own, kept, parameter.numel(), *_of_factors(use, parameter.numel()))


def _of_factors(use: Use | None, numbers: int) -> tuple[int, int]:
    """Numbers of a product of two rows, and those that a row's factors add to a sum."""
    if use is None:
        return numbers, 0
    positions = use.tensors[-1].shape[1]
    if isinstance(use, Gather):
        return numbers, positions * use.tensors[-1].shape[2]
    if not isinstance(use, Outer):
        return numbers, positions * prod(use.tensors[-1].shape[3:]) * numbers
    return min(numbers, positions**2 * sum(use.shape)), positions * numbers


def on_data(name: str, budget: int | None = None) -> Steps:
    """Full requests on the data of the unlearning benchmark."""
    choice = cases.Choice(name)
    case, parts = cases.load(choice), cases.parts(choice, 0)
    torch.manual_seed(0)
    problem, model = case.problem, case.problem.net()
    drawn = torch.Generator().manual_seed(0)
    targets = problem.requests["full"]

    def forward() -> Callable[[], Ready]:
        batch, mask = draw(problem, parts, targets, case.protocol, drawn)
        there = metrics.present(batch.labels)
        return lambda: Ready(problem.losses(model(batch.image), batch.labels), mask, there)

    return Steps(model, [forward() for _ in range(BATCHES)], budget)


def on_model(name: str, budget: int | None = None) -> Steps:
    """One task of a model of the step benchmarks: what is kept is that of one batch, four times."""
    case = models.build(name, 1)
    mask = dict.fromkeys(case.labels, case.forget)
    forwards = [lambda: Ready(case.losses(), mask, None)] * BATCHES
    return Steps(case.model, forwards, budget)


def timed(call: Callable[[], object], rounds: int) -> float:
    """Median processor seconds."""
    found = []
    for _ in range(rounds + 1):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the times, and those of the products."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("digits", "rooms", *models.MODELS), default="digits")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--budget", type=int, help="MiB that kept rows may take")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    make = on_model if options.data in models.MODELS else on_data
    steps = make(options.data, None if options.budget is None else options.budget << 20)
    pairs = steps.paired(options.rounds)
    plain, kept = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(full / bare for bare, full in pairs)
    sizes = list(steps.of_parameters())
    V, K, P = max(s.own for s in sizes), len(steps.memory), sum(s.numbers for s in sizes)
    print(f"{options.data}: V = {V}, K = {K}, P = {P}, {steps.memory}")
    print(f"OrthoGrad {plain:.0f} ms, with a full memory {kept:.0f} ms, ratio {ratio:.2f}")
    rows = statistics.median(steps.taken(i) for _ in range(options.rounds) for i in range(BATCHES))
    flop = 2 * sum((s.own * (s.own + 1) // 2 + s.own * s.kept) * s.product for s in sizes)
    added = 2 * sum((s.own + s.kept) * s.added for s in sizes)
    products = flop / speed(torch.float64, options.rounds)
    sums = added / speed(torch.float32, options.rounds)
    explicit = torch.randn(V + K, sum(s.numbers for s in sizes if not s.added))
    reading = 2 * timed(explicit.sum, options.rounds)
    least = rows + products + sums + reading
    print(
        f"least: rows {1e3 * rows:.0f} ms, products of {flop / 1e9:.2f} GFLOP {1e3 * products:.0f} ms, sums of "
        f"{added / 1e9:.2f} GFLOP {1e3 * sums:.0f} ms, reading {1e3 * reading:.0f} ms, together {1e3 * least:.0f} ms, "
        f"ratio {1e3 * least / plain:.2f}"
    )


def speed(dtype: torch.dtype, rounds: int) -> float:
    """FLOP a second of a large product."""
    large = torch.randn(1024, 1024, dtype=dtype)
    return 2 * 1024**3 / timed(lambda: large @ large, rounds)


if __name__ == "__main__":
    main()
