"""The means of what a losses function gives, over a loader in evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._checks.losses import labelled
from mtu_fast._distributed.crew import Crew
from mtu_fast.unlearning.loaders import generators_of, one_pass
from mtu_fast.unlearning.modes import evaluating
from mtu_fast.unlearning.randomness import preserved
from mtu_fast.unlearning.reading import LossFunction, ScoreFunction, Side, scores_of

ALONE = Crew()


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

    def totals(self) -> dict[str, float]:
        return {task: float(total) for task, total in self.total.items()}

    def counts(self) -> dict[str, int]:
        return {task: int(count) for task, count in self.count.items()}


def measure(
    name: str,
    model: nn.Module,
    loader: Iterable[Any],
    losses: LossFunction,
    score: ScoreFunction | None,
    generators: Iterable[torch.Generator] = (),
    crew: Crew = ALONE,
) -> Measured:
    """Mean loss and score per task of a model on a loader; no random generator is affected.

    Over ranks, each with a loader of its share: losses of all samples, and scores that are means
    over samples.

    Args:
        name: what errors call the loader.
        model: measured in evaluation mode.
        loader: of batches.
        losses: see `unlearn`.
        score: see `unlearn`.
        generators: those that the functions or the data draw from, beside the loader's and the
            default ones.
        crew: who takes part.

    Returns:
        What was measured; the same on every rank.

    Raises:
        TypeError: `score` does not give {task: number}.
        ValueError: the loader gives no batch, or far more than it says.
    """

    def own() -> tuple[_Sums, dict[str, float] | None]:
        sums = _Sums()
        with preserved([*generators_of(loader), *generators]), evaluating(model):
            for batch in one_pass(name, loader):
                sums.add(labelled(losses(model, batch)))
            if not sums.batches:
                raise ValueError(f"{name}: the loader gave no batch.")
            if score is None:
                return sums, None
            return sums, scores_of(score(model, loader))

    sums, scores = crew.agreed(f"unlearn: evaluation of {name}", own)
    found = sums.losses()
    if crew.is_ranked:
        # what is sent to other ranks goes by the host
        found = {task: loss.cpu() for task, loss in found.items()}
    mine = _Share(sums.totals(), sums.counts(), sums.samples, scores, found)
    shares = crew.objects(f"unlearn: evaluation of {name}", mine)
    means = _means(shares)
    joined = (
        {task: -loss for task, loss in means.items()} if scores is None else _joined_scores(shares)
    )
    samples = sum(share.samples for share in shares)
    return Measured(means, joined, tuple(sums.total), samples, sums.batches, _losses(shares))


@dataclass(frozen=True)
class _Share:
    """What one rank measured: sums of losses, labelled samples and scores {task: ...}, all samples, their losses."""

    totals: dict[str, float]
    counts: dict[str, int]
    samples: int
    scores: dict[str, float] | None
    losses: dict[str, Tensor]


def _means(shares: Sequence[_Share]) -> dict[str, float]:
    found = {}
    for task in shares[0].totals:
        count = sum(share.counts.get(task, 0) for share in shares)
        if count:
            # exact, so that the order of the ranks does not count
            found[task] = math.fsum(share.totals.get(task, 0.0) for share in shares) / count
    return found


def _joined_scores(shares: Sequence[_Share]) -> dict[str, float]:
    """Means of the ranks' scores, by their labelled samples."""
    if len(shares) == 1:
        return shares[0].scores or {}
    tasks: dict[str, None] = {}  # in the order of the first rank that knows them
    for share in shares:
        tasks.update(dict.fromkeys(share.scores or ()))
    return {task: _joined_score(shares, task) for task in tasks}


def _joined_score(shares: Sequence[_Share], task: str) -> float:
    """The mean of one task's scores; NaN where no rank has a labelled sample."""
    values, counts = [], []
    for share in shares:
        count = share.counts.get(task)
        # a score of no sample means nothing, and may be NaN: 0 * NaN would spoil the sum
        if count and share.scores and task in share.scores:
            values.append(share.scores[task] * count)
            counts.append(count)
    return math.fsum(values) / sum(counts) if counts else math.nan


def _losses(shares: Sequence[_Share]) -> dict[str, Tensor]:
    if len(shares) == 1:
        return shares[0].losses
    found: dict[str, list[Tensor]] = {}
    for share in shares:
        for task, losses in share.losses.items():
            found.setdefault(task, []).append(losses)
    return {task: torch.cat(pieces) for task, pieces in found.items()}
