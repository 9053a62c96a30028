"""What a step costs where rows are many and half of them are to be forgotten, and what its largest layer is made of.

python -m benchmarks.notes.many_rows [--quick]

Three tasks, so that a batch of N samples has 3 N rows. Of the layer [256, 1024] with 64 positions a
sample: the op `outer_direct`, the same with all rows added up to one (so that nothing is left but
forming them), and what is left of it for the float64 products.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import mtu_fast as mtu
from benchmarks.measure import SETTLED, interleaved
from benchmarks.models import Sizes, build
from benchmarks.peers.ways import plain
from mtu_fast._ops.gram import outer_direct

TASKS = 3
CASES = (("transformer", 64), ("vit", 64), ("transformer", 16), ("vit", 16))


def step_over_plain(name: str, samples: int, repeats: int, quick: bool) -> tuple[float, float]:
    """The ratio of the steps' times, half of the samples to be forgotten, and its spread."""
    case = build(name, TASKS, quick, sizes=Sizes(samples=samples))
    engine, method = mtu.Engine(case.model, params=case.params.values()), mtu.OrthoGrad(0.5)
    forget = torch.arange(samples) % 2 == 0

    def step() -> None:
        case.model.zero_grad()
        engine.backward(case.losses(), method, forget=forget)

    for _ in range(SETTLED):
        step()
    times = interleaved({"plain": plain(case).step, "step": step}, repeats)
    return times["step"].ratio(times["plain"])


def halved(samples: int) -> list[int]:
    """Where rows go of which every second one is to be forgotten: those of a task into one."""
    into, count = [], 0
    for _ in range(TASKS):
        opening = count
        count += 1
        for n in range(samples):
            into.append(opening if n % 2 == 0 else count)
            count += n % 2
    return into


def of_a_layer(samples: int, repeats: int, quick: bool) -> tuple[float, float]:
    """Milliseconds to form the rows of the layer, and for the products of those that are left."""
    positions, a, b = (4, 8, 8) if quick else (64, 256, 1024)
    left = [torch.randn(samples, positions, a)] * TASKS
    right = [torch.randn(samples, positions, b) for _ in range(TASKS)]
    into, one = halved(samples), [0] * (TASKS * samples)
    calls = {
        "whole": lambda: outer_direct(left, right, "highest", into),
        "formed": lambda: outer_direct(left, right, "highest", one),
    }
    times = interleaved(calls, repeats)
    formed = times["formed"].median
    return formed, times["whole"].median - formed


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Print a line a case; return the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(argv)
    ratios = []
    for name, samples in CASES:
        ratio, spread = step_over_plain(name, samples, given.repeats, given.quick)
        ratios.append(ratio)
        print(f"{name:<12} N = {samples:<3} {ratio:.2f} ± {spread:.2f} plain steps", flush=True)
    for samples in (64, 16):
        formed, multiplied = of_a_layer(samples, given.repeats, given.quick)
        print(f"layer        N = {samples:<3} rows {formed:.1f} ms, products {multiplied:.1f} ms")
    return ratios


if __name__ == "__main__":
    main()
