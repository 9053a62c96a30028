"""One pass over each loader with all models at once: every sample's loss, entropy and distance, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._checks.losses import labelled
from mtu_fast._checks.masks import presence
from mtu_fast.unlearning.loaders import generators_of
from mtu_fast.unlearning.metrics import entropy, kl_divergence, logit_distance
from mtu_fast.unlearning.modes import evaluating
from mtu_fast.unlearning.randomness import preserved
from mtu_fast.unlearning.reading import LossFunction, ScoreFunction, Side

PerTask = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """How models and batches are read: the functions that the caller of `audit` gave; see there."""

    losses: LossFunction
    score: ScoreFunction
    outputs: Callable[[nn.Module, Any], PerTask] | None = None
    labels: Callable[[Any], PerTask] | None = None
    present: Callable[[Any], PerTask] | None = None

    def read(self, model: nn.Module, batch: Any) -> Side:
        """A batch's losses and the masks of its labelled samples, which `losses` and `present` both may name."""
        losses, there = labelled(self.losses(model, batch))
        also = presence(None if self.present is None else self.present(batch), losses)
        return losses, {task: mask & also[task] for task, mask in there.items()}


@dataclass
class Split:
    """What was measured on one loader: {model: {task: ...}}, or {task: ...} where a sample's batch or a pair decides.

    Attributes:
        samples: N of the loader.
        scores: {model: {task: score}}; None where no sample has a label for the task.
        losses: {model: {task: [n]}} float64, of the samples that have a label for the task; n may
            be 0.
        entropy: likewise, of the tasks that `outputs` names.
        kl, distance: {task: [n]} between retrained and unlearned.
        labels: {task: [n]}.
        index: {task: [n]}, each sample's place in the loader.
    """

    samples: int = 0
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    losses: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    entropy: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    kl: dict[str, Tensor] = field(default_factory=dict)
    distance: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    index: dict[str, Tensor] = field(default_factory=dict)

    @property
    def labelled(self) -> dict[str, bool]:
        """{task: whether a sample has a label for it}, all tasks in the order of the losses."""
        return {task: len(at) > 0 for task, at in self.index.items()}


def measure(
    name: str, models: Mapping[str, nn.Module], loader: Iterable[Any], reading: Reading
) -> Split:
    """Every sample of the loader under every model; one pass, so that a shuffling loader still gives pairs.

    Raises:
        TypeError: the loader can be read only once, or a function does not return what it should.
        ValueError: no batch, no label, or losses that are not finite and unreduced, one shape and
            one set of tasks.
    """
    if iter(loader) is loader:
        raise TypeError(
            f"{name}: found an iterator, expected a loader or list that can be read again; use list(...)."
        )
    split, parts = Split(), _Parts()
    for batch in loader:
        sides = {model: reading.read(net, batch) for model, net in models.items()}
        split.samples += _add_batch(parts, sides, batch, split.samples, models, reading)
    if not split.samples:
        raise ValueError(f"{name}: found no sample, expected at least one batch.")
    split.losses, split.entropy = (
        parts.per_model("loss", models),
        parts.per_model("entropy", models),
    )
    for one in ("kl", "distance", "labels", "index"):
        setattr(split, one, parts.per_task(one))
    if not any(split.labelled.values()):
        raise ValueError(
            f"{name}: no sample has a label for any of the tasks {list(split.labelled)}, expected some."
        )
    found = {model: reading.score(net, loader) for model, net in models.items()}
    split.scores = {
        model: _scores(name, model, row, split.labelled) for model, row in found.items()
    }
    return split


class _Parts(dict[tuple[str, ...], list[Tensor]]):
    """Pieces of vectors by (quantity, ..., task), joined at the end."""

    def add(self, *key: str, value: Tensor) -> None:
        self.setdefault(key, []).append(value.detach().cpu())

    def per_task(self, quantity: str) -> dict[str, Tensor]:
        return {key[-1]: torch.cat(value) for key, value in self.items() if key[0] == quantity}

    def per_model(self, quantity: str, models: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        return {
            model: {
                key[2]: torch.cat(value)
                for key, value in self.items()
                if key[:2] == (quantity, model)
            }
            for model in models
        }


def _add_batch(
    parts: _Parts, sides: Mapping[str, Side], batch: Any, start: int, models: Mapping[str, nn.Module],
    reading: Reading,
) -> int:  # fmt: skip
    """Add one batch's values; return its number of samples."""
    masks = {
        model: {task: mask.cpu() for task, mask in present.items()}
        for model, (_, present) in sides.items()
    }
    there = masks["original"]
    for model, its in masks.items():
        if list(its) != list(there) or any(
            not torch.equal(mask, its[task]) for task, mask in there.items()
        ):
            raise ValueError(
                f"losses: the {model} model gives tasks, lengths or masks that differ from the original's on the same "
                "batch, expected the same: whether a sample has a label does not depend on the model."
            )
    kept = {task: mask.nonzero().flatten() for task, mask in there.items()}
    labels = {} if reading.labels is None else reading.labels(batch)
    for task, at in kept.items():
        parts.add("index", task, value=start + at)
        if task in labels:
            parts.add("labels", task, value=labels[task].cpu()[at])
        for model, (losses, _) in sides.items():
            value = losses[task].detach().double().cpu()[at]
            _check_finite(model, task, value)
            parts.add("loss", model, task, value=value)
    if reading.outputs is not None:
        _add_outputs(
            parts, {model: reading.outputs(net, batch) for model, net in models.items()}, kept
        )
    return len(next(iter(there.values())))


def _add_outputs(parts: _Parts, outputs: Mapping[str, PerTask], kept: Mapping[str, Tensor]) -> None:
    for task, at in kept.items():
        if task not in outputs["original"]:
            continue
        logits = {model: row[task].detach().cpu()[at] for model, row in outputs.items()}
        for model, z in logits.items():
            parts.add("entropy", model, task, value=entropy(z))
        if "retrained" in logits:
            parts.add("kl", task, value=kl_divergence(logits["retrained"], logits["unlearned"]))
            parts.add(
                "distance", task, value=logit_distance(logits["retrained"], logits["unlearned"])
            )


def _check_finite(model: str, task: str, loss: Tensor) -> None:
    bad = (~torch.isfinite(loss)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"losses of task {task!r}: the {model} model gives no finite loss for samples {bad[:8]} of a batch. A "
            "sample without a label is left out by present; a model that diverged is not worth an audit."
        )


def _scores(
    split: str, model: str, found: object, known: Mapping[str, bool]
) -> dict[str, float | None]:
    """The scores; what a score function makes of a task without labels means nothing and is left out."""
    if not isinstance(found, Mapping) or not found:
        raise TypeError(
            f"score: found {type(found).__name__} on {split}, expected {{task: number}}, higher better."
        )
    needed = [task for task, there in known.items() if there]
    if not set(needed) <= set(found) <= set(known):
        raise ValueError(
            f"score gives tasks {sorted(found)} on {split}, losses {list(known)}; expected the same (losses that are a "
            "plain tensor are those of a task called 'loss')."
        )
    bad = [task for task in needed if not math.isfinite(found[task])]
    if bad:
        raise ValueError(
            f"score: not finite for tasks {bad} of the {model} model on {split}, expected numbers."
        )
    return {task: float(found[task]) if there else None for task, there in known.items()}


@contextmanager
def untouched(models: Iterable[nn.Module], loaders: Iterable[Any]) -> Iterator[None]:
    """Models in eval mode without gradients; modes, `requires_grad` and random states are restored."""
    models = list(models)
    required = [(p, p.requires_grad) for model in models for p in model.parameters()]
    with preserved(generators_of(*loaders)), evaluating(*models):
        try:
            yield
        finally:
            for p, needed in required:
                p.requires_grad_(needed)
