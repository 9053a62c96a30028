"""Relearn time: how soon fine-tuning brings back what was forgotten."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._arguments import check_function, check_number, check_whole
from mtu_fast._checks.losses import labelled
from mtu_fast.unlearning.arguments import check_loader, check_model, check_optimizer

MakeOptimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def relearn_steps(
    model: nn.Module,
    forget: Iterable[Any],
    losses: Callable[[nn.Module, Any], Any],
    score: Callable[[nn.Module], float],
    level: float,
    optimizer: MakeOptimizer,
    *,
    limit: int = 200,
    every: int = 1,
) -> int | None:
    """min {s : score(θ_s) ≥ level}, θ_s after s steps of fine-tuning a copy of the model on the forget set.

    The step is plain: the sum over tasks of the mean loss of a batch's labelled samples. A model
    that truly lacks the data needs about as many steps as the retrained one; far fewer say that the
    data were hidden, not removed. The protocol (mode of the model as it is, batches in the loader's
    order, over and over) is our reading.

    Args:
        model: the unlearned model; it is copied, not changed.
        forget: batches of the forget set, iterable again and again.
        losses: (model, batch) -> [N] or {task: [N]}, of the tasks to relearn, or the pair (losses,
            {task: [N] bool}) where some samples have no label for a task.
        score: model -> the score on the forget set that must come back, higher better.
        level: the original model's value of it.
        optimizer: parameters -> optimizer, for example `lambda p: torch.optim.SGD(p, lr=0.01)`.
        limit: steps after which to give up.
        every: steps between scores; the answer is a multiple of it.

    Returns:
        The number of steps, 0 if the score is there at the start, None if it is not reached within
        `limit`.

    Raises:
        TypeError: an argument of the wrong kind, or what `losses` gives is not as described.
        ValueError: the same, there is no batch, `limit` or `every` is below 1, or `level` or a
            score is not finite.
    """
    check_model("relearn_steps: model", model)
    check_loader("relearn_steps: forget", forget)
    for name, function, takes in (
        ("losses", losses, "model, batch"),
        ("score", score, "model"),
        ("optimizer", optimizer, "parameters"),
    ):
        check_function(f"relearn_steps: {name}", function, takes)
    check_whole("relearn_steps: limit", limit, 1)
    check_whole("relearn_steps: every", every, 1)
    check_number("relearn_steps: level", level)

    def backward(tuned: nn.Module, batch: Any) -> None:
        _mean_loss(*labelled(losses(tuned, batch))).backward()

    own = trainable_copy(model)
    return relearned(own, forget, backward, optimizer, Goal(score, level, limit, every))


@dataclass(frozen=True)
class Goal:
    """What is to come back, and how long it is waited for.

    Attributes:
        score: model -> the score on the forget set.
        level: the value from which it counts as back.
        limit: steps after which to give up.
        every: steps between scores.
    """

    score: Callable[[nn.Module], float]
    level: float
    limit: int
    every: int = 1

    def is_due(self, step: int) -> bool:
        """Whether the score is looked at; after the last step it is, whatever `every` is."""
        return step % self.every == 0 or step == self.limit

    def is_reached(self, model: nn.Module, step: int) -> bool:
        """Whether the model's score after these steps is back."""
        return _finite(self.score(model), step) >= self.level


def relearned(
    model: nn.Module,
    forget: Iterable[Any],
    backward: Callable[[nn.Module, Any], None],
    optimizer: MakeOptimizer,
    goal: Goal,
) -> int | None:
    """`relearn_steps` of the model itself; `backward` leaves the gradient of a batch in `.grad`.

    Raises:
        TypeError: `optimizer` gives none.
        ValueError: there is no batch, or a score is not finite.
    """
    steps = optimizer(model.parameters())
    check_optimizer("relearn_steps: optimizer", steps)
    # a fresh iterator for each pass, so that a loader shuffles anew
    batches = chain.from_iterable(repeat(forget))
    # an empty loader would be asked without end
    if next(iter(forget), None) is None:
        raise ValueError(
            "relearn_steps: found no batch in forget, expected at least one; give a list or a loader."
        )
    for step in range(goal.limit + 1):
        if goal.is_due(step) and goal.is_reached(model, step):
            return step
        if step < goal.limit:
            steps.zero_grad()
            backward(model, next(batches))
            steps.step()
    return None


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy of which parameters require grad."""
    found = copy.deepcopy(model)
    if not any(parameter.requires_grad for parameter in found.parameters()):
        found.requires_grad_(True)  # a model that was frozen to be kept
    return found


def _finite(score: float, step: int) -> float:
    check_number(
        f"relearn_steps: score after {step} steps",
        score,
        "a finite number; lower the learning rate",
    )
    return score


def _mean_loss(losses: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
    """Σ_t mean of ℓ_t over the samples with a label; a task without any adds nothing."""
    means = []
    for task, loss in losses.items():
        there = present[task]
        means.append(loss.where(there, 0.0).sum() / there.sum().clamp(min=1))
    return torch.stack(means).sum()
