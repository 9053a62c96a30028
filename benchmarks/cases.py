"""The data that the unlearning benchmark runs on, with a net and sizes for each: digits, rooms, NYUv2, Cityscapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from benchmarks import demo
from benchmarks.data import Dataset, cityscapes, nyuv2, rooms
from benchmarks.nets import DenseNet, dense_losses, dense_scores
from benchmarks.protocol import Grid, Problem, Protocol
from benchmarks.scenes import make_scenes
from benchmarks.training import divide

# of a learning rate: every setting is tried with it as well
GENTLE = 0.25
# instead, where runs settle: they end in small steps, whatever they begin with
BOLD = 3.0


def grids(first: Mapping[str, Grid]) -> dict[str, Grid]:
    """{family: its settings, and each again at a quarter of its rate}, and with `settled` at three times the rate."""
    ending = {family: _also(grid, GENTLE) for family, grid in first.items()}
    return ending | {settled(family): _also(grid, BOLD) for family, grid in first.items()}


def settled(family: str) -> str:
    """The name of the settings of a family for runs that settle."""
    return f"{family}, settled"


def _also(grid: Grid, factor: float) -> Grid:
    return (*grid, *((alpha, factor * lr) for alpha, lr in grid))


# (alpha, learning rate); a step is at most `clip` times as long as the learning rate. The first
# three were chosen by whether and when runs of seed 0 come down to the level within 100 steps.
DENSE = grids({
    "protective": ((0.5, 0.2), (0.5, 0.4), (0.6, 0.8)),
    "orthogonal": ((0.1, 0.8), (0.3, 0.8), (0.3, 1.6)),
    "subspace": ((0.0, 0.8), (0.1, 1.6), (0.2, 1.6)),
    "ascent": ((0.0, 0.05), (0.0, 0.1), (0.0, 0.2)),
    "descent": ((1.0, 0.4), (1.0, 0.8), (1.0, 1.6)),
    "surgery": ((0.5, 0.4), (0.5, 0.8), (0.5, 1.6)),
})
DIGITS = grids({
    "protective": ((0.5, 0.2), (0.7, 0.4), (0.8, 0.4)),
    "orthogonal": ((0.5, 0.4), (0.7, 0.4), (0.5, 0.8)),
    "subspace": ((0.1, 0.4), (0.3, 0.4), (0.5, 0.8)),
    "ascent": ((0.0, 0.02), (0.0, 0.05), (0.0, 0.1)),
    "descent": ((1.0, 0.1), (1.0, 0.2), (1.0, 0.4)),
    "surgery": ((0.5, 0.1), (0.5, 0.2), (0.5, 0.4)),
})
NAMES = ("digits", "rooms", "nyuv2", "cityscapes")


@dataclass(frozen=True)
class Choice:
    """What was asked for on the command line; processes hand this to one another."""

    data: str
    root: Path | None = None
    quick: bool = False
    kept: int = Protocol.kept


@dataclass(frozen=True)
class Case:
    """A problem, how much of everything, and the splits train, forget, retain, validation and test of a seed."""

    problem: Problem
    protocol: Protocol
    split: Callable[[int], Mapping[str, Dataset]]
    rounds: int = 3  # of timed steps


@lru_cache(maxsize=1)
def load(choice: Choice) -> Case:
    """The case of this name.

    Args:
        choice: data and root; `quick` makes everything small, with one setting a method.

    Returns:
        The case.

    Raises:
        ValueError: the name is unknown, or a root is missing or not needed.
    """
    if choice.data not in NAMES:
        raise ValueError(f"data is {choice.data!r}, expected one of {', '.join(NAMES)}")
    on_disk = choice.data in ("nyuv2", "cityscapes")
    if on_disk == (choice.root is None):
        raise ValueError(
            f"--data {choice.data} {'needs' if on_disk else 'makes its data and takes no'} --root PATH"
        )
    case = _digits(choice.quick) if choice.data == "digits" else _dense(choice)
    case = replace(case, protocol=replace(case.protocol, kept=choice.kept))
    if not choice.quick:
        return case
    grids = {family: grid[1:2] for family, grid in case.protocol.grids.items()}
    return replace(case, protocol=replace(case.protocol, grids=grids, steps=30), rounds=1)


@lru_cache(maxsize=1)
def parts(choice: Choice, seed: int) -> Mapping[str, Dataset]:
    """The splits of one seed, made once a process."""
    return load(choice).split(seed)


def _digits(quick: bool) -> Case:
    sizes = {"train": 400, "validation": 200, "test": 298}

    def split(seed: int) -> dict[str, Dataset]:
        scenes = make_scenes(sizes, seed)
        return {**divide(scenes.pop("train"), 40), **scenes}

    protocol = Protocol(
        epochs=60, retain_batch=20, forget_batch=10, steps=300, watch=False, grids=DIGITS
    )
    return Case(demo.problem(16 if quick else 24), protocol, split)


def _dense(choice: Choice) -> Case:
    tasks, classes = {"rooms": (rooms.TASKS, len(rooms.CLASSES)), "nyuv2": (nyuv2.TASKS, nyuv2.CLASSES),
                      "cityscapes": (cityscapes.TASKS, cityscapes.CLASSES)}[choice.data]  # fmt: skip
    width = 24 if choice.data == "rooms" else 48
    problem = Problem(
        choice.data,
        tasks,
        ("segmentation",),
        partial(DenseNet, tasks, classes, width),
        dense_losses,
        dense_scores,
    )
    protocol = Protocol(
        epochs=40 if choice.quick else 100, peak=6e-3, batch=16, retain_batch=12, forget_batch=6, steps=300, every=4,
        watch=False, grids=DENSE,
    )  # fmt: skip
    split = partial(_rooms, choice.quick) if choice.data == "rooms" else partial(_folders, choice)
    return Case(problem, protocol, split)


def _rooms(quick: bool, seed: int) -> dict[str, Dataset]:
    sizes = {"train": 240, "validation": 100, "test": 150}
    sizes = {name: count // 3 if quick else count for name, count in sizes.items()}
    made = rooms.make_rooms(sizes, height=24, width=36, seed=seed)
    return {**divide(made.pop("train"), sizes["train"] // 8), **made}


def _folders(choice: Choice, seed: int) -> dict[str, Dataset]:
    """A tenth of `train`, drawn by the seed, is F; the halves of `val`, drawn by the seed, are validation and test."""
    load_split = nyuv2.load if choice.data == "nyuv2" else cityscapes.load
    training, held_out = (load_split(choice.root or "", name) for name in ("train", "val"))
    generator = torch.Generator().manual_seed(seed)
    training = training.subset(torch.randperm(len(training), generator=generator))
    held_out = held_out.subset(torch.randperm(len(held_out), generator=generator))
    half = len(held_out) // 2
    return {**divide(training, max(len(training) // 10, 1)),
            "validation": held_out.subset(slice(0, half)), "test": held_out.subset(slice(half, None))}  # fmt: skip
