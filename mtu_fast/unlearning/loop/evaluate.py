"""The means of what a losses function gives, over a loader in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._checks.losses import labelled
from mtu_fast.unlearning.loaders import generators_of
from mtu_fast.unlearning.modes import evaluating
from mtu_fast.unlearning.randomness import preserved
from mtu_fast.unlearning.reading import LossFunction, ScoreFunction


@dataclass(frozen=True)
class Measured:
    """A model on the data of one loader.

    Attributes:
        loss: {task: mean loss} over the labelled samples; a task without any is left out.
        score: {task: score}, higher better.
        tasks: all tasks that the losses function knows.
        samples: how many.
        batches: in how many batches.
    """

    loss: dict[str, float]
    score: dict[str, float]
    tasks: tuple[str, ...]
    samples: int
    batches: int


def measure(
    name: str, model: nn.Module, loader: Iterable[Any], losses: LossFunction, score: ScoreFunction | None,
    generators: Iterable[torch.Generator] = (),
) -> Measured:  # fmt: skip
    """Mean loss and score per task of a model on a loader; no random generator notices.

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
        ValueError: the loader gives no batch.
    """
    total: dict[str, Tensor] = {}
    count: dict[str, Tensor] = {}
    samples = batches = 0
    with preserved([*generators_of(loader), *generators]), evaluating(model):
        for batch in loader:
            named, present = labelled(losses(model, batch))
            for task, loss in named.items():
                total[task] = total.get(task, 0.0) + loss.double().where(present[task], 0.0).sum()
                count[task] = count.get(task, 0.0) + present[task].sum()
            samples, batches = samples + len(next(iter(named.values()))), batches + 1
        if not batches:
            raise ValueError(f"{name}: the loader gave no batch.")
        n = {task: int(one) for task, one in count.items()}
        mean = {task: float(total[task]) / n[task] for task in total if n[task]}
        scored = {task: -loss for task, loss in mean.items()}
        if score is not None:
            scored = {task: float(value) for task, value in score(model, loader).items()}
    return Measured(mean, scored, tuple(total), samples, batches)
