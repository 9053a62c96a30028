"""A step on W ranks of one thread against one rank of one thread: time, and bytes counted against the model.

    python -m benchmarks.scaling_ranks --ranks 2

Weak: every rank has as many samples as the one. Strong: it has a share of them. The model of the
Gram's exchange: of every layer each rank sends what it holds of it, once, unless it multiplies that
layer itself, so (W - 1) / W of it on average over ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import mtu_fast as mtu


class Sizes(NamedTuple):
    """A chain of linear layers over positions."""

    layers: int = 6
    width: int = 256
    positions: int = 16
    samples: int = 16
    steps: int = 5


class Result(NamedTuple):
    """Seconds of a step and of its phases, medians; bytes of uses that a rank sends in a step, mean over ranks.

    Attributes:
        seconds: of the step.
        rows: of the forward and of taking rows.
        gram: of the Gram matrix: exchange and products.
        update: of weights, direction and `.grad`.
        sent: bytes.
        model: bytes of the model.
    """

    seconds: float
    rows: float
    gram: float
    update: float
    sent: float
    model: float


def step_of(engine: mtu.Engine, model: nn.Module, x: torch.Tensor) -> list[float]:
    """One step of OrthoGrad, half of the samples to be forgotten; seconds of its phases."""
    times = [time.perf_counter()]
    losses = model(x).square().mean((1, 2))
    rows = engine.rows(losses, forget=torch.arange(len(x)) % 2 == 0)
    times.append(time.perf_counter())
    G = rows.gram()
    times.append(time.perf_counter())
    rows.backward(mtu.OrthoGrad(0.5)(G, rows.roles))
    times.append(time.perf_counter())
    model.zero_grad()
    return [after - before for before, after in pairwise(times)]


def measured(sizes: Sizes, samples: int, rank: int, ranks: int) -> Result:
    """Steps on this rank, timed between barriers."""
    torch.manual_seed(0)
    layers = [nn.Linear(sizes.width, sizes.width, bias=False) for _ in range(sizes.layers)]
    model = nn.Sequential(*layers)
    group = dist.group.WORLD if ranks > 1 else None
    engine = mtu.Engine(model, group=group)
    x = torch.randn(samples, sizes.positions, sizes.width)
    steps = []
    for _ in range(3 + sizes.steps):
        dist.barrier()
        steps.append(step_of(engine, model, x))
    sent = 0.0
    if engine._taking.ranks is not None:
        sent = engine._taking.ranks.sent["rows.gram: uses"] / len(steps)
    held = min(sizes.positions * 2 * sizes.width, sizes.width**2) * 4 * samples * sizes.layers
    seconds = median(map(sum, steps[3:]))
    rows, gram, update = (median(of_phase) for of_phase in zip(*steps[3:], strict=True))
    return Result(seconds, rows, gram, update, sent, held * (ranks - 1) / ranks)


def run(rank: int, ranks: int, folder: str, sizes: Sizes) -> None:
    """One process: weak and strong, the mean over ranks written by rank 0."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    for name, samples in (("weak", sizes.samples), ("strong", sizes.samples // ranks)):
        found = torch.tensor(measured(sizes, samples, rank, ranks), dtype=torch.float64)
        dist.all_reduce(found)
        if rank == 0:
            torch.save(found / ranks, f"{folder}/{name}{ranks}.pt")
    dist.destroy_process_group()


def compared(ranks: int, sizes: Sizes) -> dict[str, Result]:
    """{"one", "weak", "strong": what was measured}."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, ranks):
            args = [(rank, count, folder, sizes) for rank in range(count)]
            processes = [context.Process(target=run, args=each) for each in args]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        files = {"one": "weak1.pt", "weak": f"weak{ranks}.pt", "strong": f"strong{ranks}.pt"}
        return {
            name: Result(*torch.load(Path(folder) / file).tolist()) for name, file in files.items()
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    ranks = options.pop("ranks")
    found = compared(ranks, Sizes(**options))
    heads = "".join(f"{head:>10}" for head in ("rows", "gram", "update", "over one", "MiB sent"))
    print(f"{'':8}{'ms a step':>12}{heads}{'model':>8}")
    for name, result in found.items():
        ratio = result.seconds / found["one"].seconds
        sent, model = result.sent / 2**20, result.model / 2**20
        phases = "".join(f"{1e3 * s:10.1f}" for s in (result.rows, result.gram, result.update))
        print(f"{name:8}{1e3 * result.seconds:12.1f}{phases}{ratio:10.2f}{sent:10.3f}{model:8.3f}")


if __name__ == "__main__":
    main()
