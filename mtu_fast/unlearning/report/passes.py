"""One pass over each loader with all models at once: every sample's loss, entropy and distance, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtu_fast._arguments import check_dense, check_function, check_mapping, check_tensors
from mtu_fast._checks.losses import labelled
from mtu_fast._checks.masks import presence
from mtu_fast._distributed.crew import Crew
from mtu_fast._distributed.wrappers import is_fsdp, is_sliced, is_tensor_parallel
from mtu_fast.unlearning.arguments import NO_LOADERS
from mtu_fast.unlearning.loaders import begun, generators_of, length_of
from mtu_fast.unlearning.metrics import entropy, kl_divergence, logit_distance
from mtu_fast.unlearning.modes import evaluating
from mtu_fast.unlearning.randomness import preserved
from mtu_fast.unlearning.reading import LossFunction, ScoreFunction, Side, scores_of
from mtu_fast.unlearning.report.split import Labels, Parts, Split

PerTask = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """How models and batches are read: the functions that the caller of `audit` gave; see there."""

    losses: LossFunction
    score: ScoreFunction
    outputs: Callable[[nn.Module, Any], PerTask] | None = None
    labels: Callable[[Any], Mapping[str, Any]] | None = None
    present: Callable[[Any], PerTask] | None = None

    def __post_init__(self) -> None:
        check_function("losses", self.losses, "model, batch")
        check_function("score", self.score, "model, loader")
        if self.outputs is not None:
            check_function("outputs", self.outputs, "model, batch")
        for name in ("labels", "present"):
            if getattr(self, name) is not None:
                check_function(name, getattr(self, name), "batch")

    def read(self, model: nn.Module, batch: Any) -> Side:
        """A batch's losses and the masks of its labelled samples, which `losses` and `present` both may name."""
        losses, there = labelled(self.losses(model, batch))
        if self.present is None:
            return losses, there
        also = presence(self.present(batch), losses)
        return losses, {task: mask & also[task] for task, mask in there.items()}


def check_batches(name: str, loader: object) -> None:
    """Batches that can be read again and again.

    Raises:
        TypeError: something else.
    """
    if isinstance(loader, NO_LOADERS) or not isinstance(loader, Iterable):
        raise TypeError(f"{name}: found {type(loader).__name__}, expected batches.")
    # an iterator is used up by the first pass, and `score` needs one more for each model
    if isinstance(loader, Iterator):
        raise TypeError(
            f"{name}: found an iterator, expected a loader or list that can be read again; use list(...)."
        )


def check_parallel(models: Mapping[str, nn.Module]) -> None:
    """Ranks of a tensor parallel model share their batches, and those of FSDP2 or DDP do not.

    Raises:
        ValueError: models of both.
    """
    shared = [name for name, model in models.items() if is_tensor_parallel(model)]
    if not shared:
        return
    if "unlearned" not in shared:
        raise ValueError(
            f"{shared[0]}: found a tensor parallel model beside an `unlearned` that is none, expected a plain one, or "
            "`unlearned` tensor parallel as well: by it is decided whether ranks read the same batches."
        )
    others = [name for name, model in models.items() if is_fsdp(model)]
    if others:
        raise ValueError(
            f"{others[0]}: found an FSDP2 model beside a tensor parallel `unlearned`, expected a tensor parallel one "
            "as well, or a plain one: ranks of a tensor parallel model read the same batches, those of FSDP2 do not."
        )


def check_shares(models: Iterable[nn.Module], loaders: Mapping[str, object], crew: Crew) -> None:
    """Where a forward of one rank waits for the others, all have as many batches.

    Raises:
        ValueError: they have not.
    """
    if not any(map(is_sliced, models)):
        return
    for name, loader in loaders.items():
        lengths = crew.every("audit", length_of(loader))
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{name}: found {lengths} batches on the ranks of a model in slices, expected as many on each: of "
                "FSDP2 give it a torch.utils.data.distributed.DistributedSampler, of tensor parallel the same batches."
            )


def measure(
    name: str,
    models: Mapping[str, nn.Module],
    loader: Iterable[Any],
    reading: Reading,
    crew: Crew,
) -> Split:
    """Every sample of the loader under every model; one pass, so that a shuffling loader still gives pairs.

    Args:
        name: of the loader, for errors.
        models: all.
        loader: of batches; on several ranks of this one's share.
        reading: how both are read.
        crew: who takes part.

    Returns:
        What was measured on all ranks, rank after rank.

    Raises:
        TypeError: a function does not return what it should.
        ValueError: no batch, no label, or losses that are not finite and unreduced, one shape and
            one set of tasks.
    """
    # one pass for all models: under any order of the loader, samples are paired
    mine = crew.agreed(f"audit: {name}", lambda: _share(name, models, loader, reading))
    parts, samples, counts = Parts(), 0, []
    for share, count in crew.objects(f"audit: {name}", mine):
        counts.append({task: len(at) for task, at in share.joined("index").items()})
        # places of samples go on over the ranks
        share.shift(samples)
        parts.take(share)
        samples += count
    split = parts.split(samples, models)
    split.counts = counts
    known = split.labelled
    if not any(known.values()):
        raise ValueError(
            f"{name}: no sample has a label for any of the tasks {list(known)}, expected some."
        )
    for model, net in models.items():
        split.scores[model] = _scores(
            name, model, scored(name, net, loader, reading, crew, counts), known
        )
    return split


def scored(
    name: str,
    net: nn.Module,
    loader: Iterable[Any],
    reading: Reading,
    crew: Crew,
    counts: Sequence[Mapping[str, int]],
) -> Any:
    """What `score` gives of a model; on several ranks the means over them by labelled samples."""
    own = crew.agreed(f"audit: {name}", partial(reading.score, net, loader))
    given = crew.objects(f"audit: {name}", own)
    return given[0] if crew.size == 1 else _mean(given, counts)


def _share(
    name: str, models: Mapping[str, nn.Module], loader: Iterable[Any], reading: Reading
) -> tuple[Parts, int]:
    """What this rank's loader gives, and its number of samples."""
    parts, samples = Parts(), 0
    for batch in begun(name, loader):
        samples += _add_batch(parts, batch, samples, models, reading)
    if not samples:
        raise ValueError(f"{name}: found no sample, expected at least one batch.")
    return parts, samples


def _mean(given: Sequence[Any], weights: Sequence[Mapping[str, int]]) -> Any:
    """The ranks' scores, weighted by their labelled samples."""
    if not all(isinstance(of_rank, Mapping) for of_rank in given):
        return given[0]
    tasks = dict.fromkeys(task for of_rank in given for task in of_rank)
    return {task: _mean_of(task, given, weights) for task in tasks}


def _mean_of(
    task: str, given: Sequence[Mapping[str, Any]], weights: Sequence[Mapping[str, int]]
) -> Any:
    """The mean of one task's scores; NaN where no rank has a labelled sample."""
    weighted, present = [], []
    for of_rank, counts in zip(given, weights, strict=True):
        count = counts.get(task)
        # a rank without labelled samples may score NaN, which a weight of 0 would not remove
        if count and task in of_rank:
            weighted.append(of_rank[task] * count)
            present.append(count)
    return sum(weighted) / sum(present) if present else math.nan


def _add_batch(
    parts: Parts, batch: Any, start: int, models: Mapping[str, nn.Module], reading: Reading
) -> int:
    """Add one batch's values; return its number of samples."""
    sides = {model: reading.read(net, batch) for model, net in models.items()}
    there = _masks(sides)
    samples = len(next(iter(there.values())))
    # per task the labelled samples, by place in the batch
    kept = {task: mask.nonzero().flatten() for task, mask in there.items()}
    for task, at in kept.items():
        parts.add("index", task, start + at)
    if reading.labels is not None:
        _add_labels(parts, reading.labels(batch), there)
    for model, (losses, _) in sides.items():
        _add_losses(parts, model, losses, kept)
    if reading.outputs is not None:
        outputs = {}
        for model, net in models.items():
            outputs[model] = check_mapping("outputs", reading.outputs(net, batch))
        for task, at in kept.items():
            # a task of regression has no logits
            if task in outputs["original"]:
                _add_outputs(parts, task, outputs, at, samples)
    return samples


def _masks(sides: Mapping[str, Side]) -> dict[str, Tensor]:
    """The labelled samples, {task: [N]} on the CPU, which must be the same for all models."""
    there = _on_cpu(sides["original"][1])
    for model, (_, present) in sides.items():
        if not _same(there, _on_cpu(present)):
            raise ValueError(
                f"losses: the {model} model gives tasks, lengths or masks that differ from the original's on the same "
                "batch, expected the same: whether a sample has a label does not depend on the model."
            )
    return there


def _on_cpu(masks: PerTask) -> dict[str, Tensor]:
    return {task: mask.cpu() for task, mask in masks.items()}


def _same(one: PerTask, other: PerTask) -> bool:
    return list(one) == list(other) and all(map(torch.equal, one.values(), other.values()))


def _add_labels(parts: Parts, labels: object, there: PerTask) -> None:
    by_task = check_mapping("labels", labels)
    for task, mask in there.items():
        if task in by_task:
            parts.add_labels(task, _classes(f"labels[{task!r}]", by_task[task], mask))


def _classes(name: str, given: Any, mask: Tensor) -> Labels:
    """The classes of the labelled samples: a tensor, or a list of anything."""
    if isinstance(given, Tensor):
        check_dense(name, given)
        if given.shape != mask.shape:
            raise TypeError(
                f"{name}: found shape {tuple(given.shape)}, expected the class of each sample, [{len(mask)}]."
            )
        return given.detach().cpu()[mask]
    if not isinstance(given, Sequence | np.ndarray):
        raise TypeError(
            f"{name}: found {type(given).__name__}, expected the class of each sample, [{len(mask)}]."
        )
    if len(given) != len(mask):
        raise ValueError(
            f"{name}: found {len(given)} classes, expected {len(mask)}, one per sample."
        )
    return list(compress(given, mask.tolist()))


def _add_losses(parts: Parts, model: str, losses: PerTask, kept: PerTask) -> None:
    for task, at in kept.items():
        # off the device at once: a pass holds one batch of it
        value = losses[task].detach().double().cpu()[at]
        _check_finite(model, task, value)
        parts.add("loss", task, value, model)


def _add_outputs(
    parts: Parts, task: str, outputs: Mapping[str, PerTask], at: Tensor, samples: int
) -> None:
    logits = {}
    for model, row in outputs.items():
        check_tensors(outputs=row.get(task))
        given = row[task]
        if given.dim() < 2 or len(given) != samples:
            raise ValueError(
                f"outputs[{task!r}]: found shape {tuple(given.shape)}, expected logits [{samples}, C, ...]."
            )
        logits[model] = given.detach().cpu()[at]
        parts.add("entropy", task, entropy(logits[model]), model)
    if "retrained" in logits:
        ideal, unlearned = logits["retrained"], logits["unlearned"]
        parts.add("kl", task, kl_divergence(ideal, unlearned))
        parts.add("distance", task, logit_distance(ideal, unlearned))


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
    numbers = scores_of(found)
    bad = [task for task in needed if not math.isfinite(numbers[task])]
    if bad:
        raise ValueError(
            f"score: not finite for tasks {bad} of the {model} model on {split}, expected numbers."
        )
    scores: dict[str, float | None] = dict.fromkeys(known)
    for task in needed:
        scores[task] = numbers[task]
    return scores


@contextmanager
def untouched(models: Iterable[nn.Module], loaders: Iterable[Any]) -> Iterator[None]:
    """Models in eval mode without gradients; modes, `requires_grad` and random states are restored."""
    models = list(models)
    parameters = [p for model in models for p in model.parameters()]
    required = [p.requires_grad for p in parameters]
    with preserved(generators_of(*loaders)), evaluating(*models):
        try:
            yield
        finally:
            for p, needed in zip(parameters, required, strict=True):
                p.requires_grad_(needed)
