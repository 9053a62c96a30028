"""Relearn time in an audit: of a copy, or of the model itself where it is in slices, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mtu_fast._distributed.chunks import local_of
from mtu_fast._distributed.crew import Crew
from mtu_fast._distributed.ranks import Ranks
from mtu_fast._distributed.wrappers import bare, is_sliced, slices_of
from mtu_fast.engine import Engine
from mtu_fast.methods import Mean
from mtu_fast.unlearning.metrics.relearn import (
    Goal,
    MakeOptimizer,
    relearn_steps,
    relearned,
    trainable_copy,
)
from mtu_fast.unlearning.reading import Side
from mtu_fast.unlearning.report.passes import Reading, scored

# share of the original's forget score from which it counts as back; the last bit takes as long as
# it likes
BACK = 0.95


def relearn(
    models: Mapping[str, nn.Module],
    forget: Iterable[Any],
    reading: Reading,
    targets: Sequence[str],
    optimizer: MakeOptimizer,
    limit: int,
    crew: Crew,
    ranks: Ranks | None,
    counts: Sequence[Mapping[str, int]],
) -> dict[str, int | None]:
    """Steps of the unlearned and of the retrained model until the targets' mean forget score is back.

    Args:
        models: all, the original among them.
        forget: batches of the data to forget, on several ranks of this one's share.
        reading: how models are read.
        targets: the tasks to relearn.
        optimizer: parameters -> optimizer.
        limit: steps after which to give up.
        crew: who takes part.
        ranks: they, where they are several.
        counts: {task: labelled samples} of each of them.
    """

    def of_targets(model: nn.Module, batch: Any) -> Side:
        losses, there = reading.read(model, batch)
        return {task: losses[task] for task in targets}, {task: there[task] for task in targets}

    def level(model: nn.Module) -> float:
        with torch.no_grad():
            found = scored("relearn", model, forget, reading, crew, counts)
        return float(sum(found[task] for task in targets) / len(targets))

    goal = level(models["original"])
    # below by 5 % of its size also where it is negative, as minus a loss
    goal -= (1 - BACK) * abs(goal)
    found = {}
    for name, model in models.items():
        if name == "original":
            continue
        with torch.enable_grad():
            if ranks is None:
                steps = relearn_steps(
                    model, forget, of_targets, level, goal, optimizer, limit=limit
                )
            else:
                back = Goal(level, goal, limit)
                steps = _over_ranks(model, forget, of_targets, optimizer, back, ranks, crew)
        found[name] = steps
    return found


def _over_ranks(
    model: nn.Module,
    forget: Iterable[Any],
    losses: Callable[[nn.Module, Any], Side],
    optimizer: MakeOptimizer,
    goal: Goal,
    ranks: Ranks,
    crew: Crew,
) -> int | None:
    """The same step over the batches of all ranks together: the mean of each task's labelled samples."""
    with _tuned(model) as own:
        # of a batch that all ranks share each has the whole step
        group = ranks.group if crew.size == ranks.size else None
        engine = Engine(own) if is_sliced(own) else Engine(own, group=group)

        def backward(tuned: nn.Module, batch: Any) -> None:
            found, present = ranks.agreed("audit: relearn", lambda: losses(tuned, batch))
            engine.backward(found, Mean(), present=present)

        return relearned(own, forget, backward, optimizer, goal)


@contextmanager
def _tuned(model: nn.Module) -> Iterator[nn.Module]:
    """A model to be changed: a copy, or itself for a while where it is in slices."""
    if not is_sliced(model):
        yield trainable_copy(bare(model))
        return
    held = slices_of(model)
    before = [local_of(p.detach()).clone() for p in held]
    gradients = [p.grad for p in held]
    for p in held:
        p.grad = None
    try:
        yield model
    finally:
        slices_of(model)
        with torch.no_grad():
            for p, own, g in zip(held, before, gradients, strict=True):
                local_of(p).copy_(own)
                p.grad = g
