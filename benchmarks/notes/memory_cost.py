"""What a full memory adds to a step of OrthoGrad, and what its products take at least.

    python -m benchmarks.notes.memory_cost [--data {digits,rooms}] [--rounds 6]

Steps of OrthoGrad and of Levelled OrthoGrad with 4 |R| kept rows take turns on the same batches, full
request, one thread. Processor times, medians; the ratio is the median over pairs of neighbouring steps.
Products: of the V rows of a step with one another and with the K kept ones, V (V + K) P multiply-adds in
float64 as the step makes them, and as one call of the vendor's in float64 and in float32, from rows that
are joined and of that precision already.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

import mtu_fast as mtu
from benchmarks import cases
from benchmarks.protocol import draw
from mtu_fast.unlearning import metrics

BATCHES = 6


class Steps:
    """Steps on some batches of one untrained net, which does not move."""

    def __init__(self, data: str) -> None:
        choice = cases.Choice(data)
        case, parts = cases.load(choice), cases.parts(choice, 0)
        torch.manual_seed(0)
        self.problem = case.problem
        self.model = case.problem.net()
        self.engines = {kept: mtu.Engine(self.model) for kept in (False, True)}
        self.memory = mtu.Memory()
        drawn = torch.Generator().manual_seed(0)
        targets = case.problem.requests["full"]
        self.batches = [
            draw(case.problem, parts, targets, case.protocol, drawn) for _ in range(BATCHES)
        ]

    def step(self, i: int, kept: bool) -> float:
        """Seconds of a step on batch i, forward included."""
        batch, mask = self.batches[i]
        began = time.process_time()
        self.model.zero_grad()
        losses = self.problem.losses(self.model(batch.image), batch.labels)
        there, engine = metrics.present(batch.labels), self.engines[kept]
        if kept:
            method = mtu.LevelledOrthoGrad(0.5)
            engine.backward(losses, method, forget=mask, present=there, memory=self.memory)
        else:
            engine.backward(losses, mtu.OrthoGrad(0.5), forget=mask, present=there)
        return time.process_time() - began

    def paired(self, rounds: int) -> list[tuple[float, float]]:
        """(without, with memory) of neighbouring steps, once the memory is full."""
        for _ in range(2):
            for i in range(BATCHES):
                self.step(i, False)
                self.step(i, True)
        order = [i for _ in range(rounds) for i in range(BATCHES)]
        return [(self.step(i, False), self.step(i, True)) for i in order]

    @property
    def rows(self) -> tuple[int, int, int]:
        """(V, K, P): rows of a step, those to forget as a mean each, kept rows, and parameters."""
        _, mask = self.batches[0]
        forgotten = sum(int(gone.sum()) for gone in mask.values())
        means = sum(bool(gone.any()) for gone in mask.values())
        total = sum(len(gone) for gone in mask.values())
        assert self.memory.size is not None
        parameters = sum(p.numel() for p in self.model.parameters())
        return total - forgotten + means, self.memory.size, parameters


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
    parser.add_argument("--data", choices=("digits", "rooms"), default="digits")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    steps = Steps(options.data)
    pairs = steps.paired(options.rounds)
    plain, kept = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(full / bare for bare, full in pairs)
    V, K, P = steps.rows
    print(f"{options.data}: V = {V}, K = {K}, P = {P}, {steps.memory}")
    print(f"OrthoGrad {plain:.0f} ms, with a full memory {kept:.0f} ms, ratio {ratio:.2f}")
    flop = 2 * V * (V + K) * P
    print(f"products: {flop / 1e9:.2f} GFLOP")
    for dtype in (torch.float64, torch.float32):
        rows = torch.randn(V + K, P, dtype=dtype)
        seconds = timed(partial(torch.matmul, rows[:V], rows.T), options.rounds)
        print(f"{dtype}, one call: {1e3 * seconds:.0f} ms, {flop / seconds / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
