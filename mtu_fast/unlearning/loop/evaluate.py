"""The means of what a losses function gives, over a loader in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from mtu_fast._arguments import check_mapping, shown
from mtu_fast._checks.losses import labelled
from mtu_fast.unlearning.loaders import generators_of, one_pass
from mtu_fast.unlearning.modes import evaluating
from mtu_fast.unlearning.randomness import preserved
from mtu_fast.unlearning.reading import LossFunction, ScoreFunction, Side


@dataclass(frozen=True)
class Measured:
    """A model on the data of one loader.

    Attributes:
        loss: {task: mean loss} over the labelled samples; a task without any is left out.
        score: {task: score}, higher better.
        tasks: all tasks that the losses function knows.
        samples: how many.
        batches: in how many batches.
        losses: {task: [V]}, the losses of the labelled samples, float64.
    """

    loss: dict[str, float]
    score: dict[str, float]
    tasks: tuple[str, ...]
    samples: int
    batches: int
    losses: dict[str, Tensor]


class _Sums:
    """Losses and counts of labelled samples, {task: ...}, on the losses' device."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.count: dict[str, Tensor] = {}
        self.pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.samples = 0
        self.batches = 0

    def add(self, side: Side) -> None:
        # sums stay on the device: one wait at the end in place of one per batch
        losses, present = side
        for task, loss in losses.items():
            there = present[task]
            self.total[task] = self.total.get(task, 0.0) + loss.double().where(there, 0.0).sum()
            self.count[task] = self.count.get(task, 0.0) + there.sum()
            self.pieces.setdefault(task, []).append((loss.double(), there))
        self.samples += len(next(iter(losses.values())))
        self.batches += 1

    def losses(self) -> dict[str, Tensor]:
        found = {}
        for task, pieces in self.pieces.items():
            loss, there = map(torch.cat, zip(*pieces, strict=True))
            if bool(there.any()):
                found[task] = loss[there]
        return found

    def means(self) -> dict[str, float]:
        found = {}
        for task, total in self.total.items():
            count = int(self.count[task])
            if count:
                found[task] = float(total) / count
        return found


def _scores(given: object) -> dict[str, float]:
    """What a score function gave: {task: number}."""
    scores = {}
    for task, value in check_mapping("score", given, "{task: number}").items():
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(number, Tensor) or not isinstance(number, SupportsFloat):
            raise TypeError(f"score: found {shown(number)} for task {task!r}, expected a number.")
        scores[task] = float(number)
    return scores


def measure(
    name: str,
    model: nn.Module,
    loader: Iterable[Any],
    losses: LossFunction,
    score: ScoreFunction | None,
    generators: Iterable[torch.Generator] = (),
) -> Measured:
    """Mean loss and score per task of a model on a loader; no random generator is affected.

    Args:
        name: what errors call the loader.
        model: measured in evaluation mode.
        loader: of batches.
        losses: see `unlearn`.
        score: see `unlearn`.
        generators: those that the functions or the data draw from, beside the loader's and the
            default ones.

    Returns:
        What was measured.

    Raises:
        TypeError: `score` does not give {task: number}.
        ValueError: the loader gives no batch, or far more than it says.
    """
    sums = _Sums()
    with preserved([*generators_of(loader), *generators]), evaluating(model):
        for batch in one_pass(name, loader):
            sums.add(labelled(losses(model, batch)))
        if not sums.batches:
            raise ValueError(f"{name}: the loader gave no batch.")
        means = sums.means()
        if score is None:
            scores = {task: -loss for task, loss in means.items()}
        else:
            scores = _scores(score(model, loader))
    tasks = tuple(sums.total)
    return Measured(means, scores, tasks, sums.samples, sums.batches, sums.losses())
