"""Whether the bandwidth between ranks would change how a layer's rows meet, on the models of the benchmarks.

    python -m benchmarks.notes.exchange_choice [--quick]

Two ways are there. One rank has all rows of a layer, as factors or as rows, whichever are fewer bytes;
or every rank has a share of the columns of all rows, which must then travel as rows, and all ranks have
as much work. What each layer takes in both is timed here on one core, for all rows of W ranks; what
travels is counted. A step waits for the rank that is last:

    max over ranks ( Σ products of its layers  +  bytes it takes in or sends / bandwidth )

for today's choice (one rank a layer, dealt out by the estimated work of its products), for the best
number of layers by columns at each bandwidth, and for layers dealt out by what they were timed at, and by
their bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

import mtu_fast as mtu
from benchmarks.models import Sizes, build
from mtu_fast._distributed.gram import _rounds
from mtu_fast._rows import products
from mtu_fast._rows.uses import Dense

MODELS = ("mlp", "transformer", "resnet", "vit")
RANKS = (2, 4, 8)
SAMPLES = 8  # a rank
RATES = {"gloo, 1 GB/s": 1e9, "100 Gb/s": 12.5e9, "450 GB/s": 450e9, "no limit": float("inf")}


class Layer(NamedTuple):
    """A parameter, of whose gradients each rank has some rows.

    Attributes:
        held: bytes of a rank's uses.
        rows: bytes of its rows.
        work: of the products of a rank's rows, as the engine estimates it.
        owner: seconds of the products of all rows, from what is held.
        columns: seconds to form a rank's rows, and of the products of its columns of all rows.
    """

    held: int
    rows: int
    work: int
    owner: float
    columns: float


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The median of some calls, after one."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def layers_of(name: str, ranks: int, quick: bool, repeats: int) -> list[Layer]:
    """The layers of a model, timed with the rows of all ranks on one process."""
    samples = (2 if quick else SAMPLES) * ranks
    case = build(name, 1, quick, sizes=Sizes(samples=samples))
    engine = mtu.Engine(case.model, params=case.params.values())
    (part,) = engine.rows(case.losses())._parts
    return [_timed(use, ranks, repeats) for use in part.uses.values()]


def _timed(use: Any, ranks: int, repeats: int) -> Layer:
    mine = torch.arange(use.count // ranks)
    whole = use.grounded().matrix()
    width = -(-whole.shape[1] // ranks)
    share = Dense((width,), whole[:, :width].contiguous())
    own = use.select(mine)
    forming = 0.0 if isinstance(use, Dense) else seconds(own.grounded, repeats)
    return Layer(
        held=use.held // ranks,
        rows=whole.nbytes // ranks,
        work=round(products.work(own)),
        owner=seconds(lambda: products.gram([use]), repeats),
        columns=forming + seconds(lambda: products.gram([share]), repeats),
    )


def waited(layers: Sequence[Layer], cut: int, ranks: int, rate: float) -> float:
    """Seconds of the last rank, where the layers of most work, so many of them, go by columns."""
    order = sorted(layers, key=lambda layer: -layer.owner)
    split, dealt = order[:cut], order[cut:]
    each = sum(layer.columns + layer.rows * (ranks - 1) / ranks / rate for layer in split)
    # as the engine deals them out
    return each + of_last(dealt, [layer.work for layer in dealt], ranks, rate)


def of_last(dealt: Sequence[Layer], weights: Sequence[int], ranks: int, rate: float) -> float:
    """Seconds of the last rank, where each layer has one rank and is dealt out by these weights."""
    owned: list[list[int]] = [[] for _ in range(ranks)]
    sizes = [layer.held for layer in dealt]
    for chosen in _rounds([sizes] * ranks, [weights] * ranks):
        for rank, of_rank in enumerate(chosen):
            owned[rank] += of_rank
    last = 0.0
    for of_rank in owned:
        comes = sum((ranks - 1) * sizes[j] for j in of_rank)
        goes = sum(sizes) - sum(sizes[j] for j in of_rank)
        work = sum(dealt[j].owner for j in of_rank)
        last = max(last, work + max(comes, goes) / rate)
    return last


def compared(layers: Sequence[Layer], ranks: int, rate: float) -> tuple[str, float]:
    """A cell of the table, and the part of the time that the best number of layers by columns leaves.

    Today's time, how many layers by columns are best, and what part of that time they leave, layers
    dealt out by their time, and by their bytes.
    """
    today = waited(layers, 0, ranks, rate)
    times = [waited(layers, cut, ranks, rate) for cut in range(len(layers) + 1)]
    best = min(times)
    timed = of_last(layers, [round(1e9 * layer.owner) for layer in layers], ranks, rate)
    sized = of_last(layers, [layer.held for layer in layers], ranks, rate)
    parts = ", ".join(f"{each / today:.2f}" for each in (best, timed, sized))
    return f"{1e3 * today:.0f} ms, {times.index(best)}: {parts}", best / today


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Print a line for each model and number of ranks; return what the best choice leaves of the time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=MODELS)
    given = parser.parse_args(argv)
    heads = "".join(f"{name:>34}" for name in RATES)
    print(f"{'':16}{'layers':>8}{heads}")
    found = []
    for name in given.models:
        for ranks in RANKS:
            layers = layers_of(name, ranks, given.quick, given.repeats)
            line = f"{name:12}{ranks:4}{len(layers):8}"
            for rate in RATES.values():
                cell, left = compared(layers, ranks, rate)
                found.append(left)
                line += f"{cell:>34}"
            print(line, flush=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
