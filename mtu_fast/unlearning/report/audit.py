"""The audit: original, unlearned and perhaps retrained model on forget, retain and test data."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from mtu_fast._arguments import check_function, check_text, check_whole
from mtu_fast._checks.masks import targeted
from mtu_fast._distributed.crew import Crew, crew_of
from mtu_fast._distributed.wrappers import is_sliced, parallel
from mtu_fast.unlearning.arguments import check_model, check_names
from mtu_fast.unlearning.loaders import sampler_of
from mtu_fast.unlearning.metrics import parameter_shift
from mtu_fast.unlearning.metrics.relearn import MakeOptimizer
from mtu_fast.unlearning.metrics.tables import check_removal
from mtu_fast.unlearning.reading import LossFunction, ScoreFunction
from mtu_fast.unlearning.report import numbers, relearning
from mtu_fast.unlearning.report.comparisons import comparisons
from mtu_fast.unlearning.report.cosines import Params, layer_cosines
from mtu_fast.unlearning.report.histograms import histograms
from mtu_fast.unlearning.report.levels import chances, loss_aims, shares
from mtu_fast.unlearning.report.passes import (
    PerTask,
    Reading,
    check_batches,
    check_parallel,
    check_shares,
    measure,
    untouched,
)
from mtu_fast.unlearning.report.plain import check_cost, plain, records, step_cost
from mtu_fast.unlearning.report.result import SCHEMA, VERSION, Audit
from mtu_fast.unlearning.report.split import Split
from mtu_fast.unlearning.report.verdict import verdict


def audit(
    original: nn.Module,
    unlearned: nn.Module,
    retrained: nn.Module | None = None,
    *,
    forget: Iterable[Any],
    retain: Iterable[Any],
    test: Iterable[Any],
    losses: LossFunction,
    score: ScoreFunction,
    targets: Iterable[str] | None = None,
    outputs: Callable[[nn.Module, Any], PerTask] | None = None,
    labels: Callable[[Any], Mapping[str, Any]] | None = None,
    present: Callable[[Any], PerTask] | None = None,
    history: object = None,
    cost: Mapping[str, Any] | None = None,
    relearn: MakeOptimizer | None = None,
    relearn_limit: int = 200,
    params: Params | None = None,
    removal: str = "instance",
    cosine_samples: int = 16,
    title: str = "Unlearning audit",
    seed: int = 0,
) -> Audit:
    """What was removed, and what else moved: every score, sample by sample where it matters.

    On several ranks (`unlearned` a DistributedDataParallel or FSDP2 model), each with loaders of its
    share, samples are those of all ranks, scores means over ranks by samples, cosines those of the
    first rank's batch, relearning is that of the ranks' batches together, and every rank has the
    same audit. The other models may be plain, or wrapped likewise. With FSDP2 every rank has as many
    batches. Ranks of a tensor parallel model all have the same loaders.

    The models are put in eval mode and back; their parameters, buffers, `.grad`, modes and torch's
    random state are as before in the end. Each loader is read once by all models together, so that
    samples are paired under any order, once per model by `score`, and, for its first batch, by the
    gradient cosines. The thresholds of the verdict are our choice and are listed in it.

    Args:
        original: the model before.
        unlearned: the model after.
        retrained: the ideal, trained without the data; gaps, ToW, over-forgetting and distances
            need it.
        forget: batches of the data to forget, readable again and again.
        retain: batches of the data to keep.
        test: batches never seen by any of the models.
        losses: as for `unlearn`: (model, batch) -> unreduced losses, [N] (of a task called "loss")
            or {task: [N]}, or the pair (losses, {task: [N] bool}) where some samples have no label
            for a task.
        score: (model, loader) -> {task: score}, higher better; UIS wants shares such as accuracy,
            above 0.
        targets: tasks to forget from; None: all (full-task).
        outputs: (model, batch) -> {task: logits [N, C, ...]} of the classification tasks, for
            entropy and KL.
        labels: batch -> {task: [N] classes}, for the worst class: an integer tensor, or a list of
            anything, for example names; tasks without one are left out.
        present: batch -> {task: [N] bool}, False where a sample has no label for the task, besides
            those that `losses` itself leaves out.
        history: anything with `.records`, a list of mappings or dataclasses with `step` and numbers
            or {task: number}.
        cost: {what: number}, or {what: {variant: number}}: for example ms per step and peak MiB;
            None for what was not measured.
        relearn: parameters -> optimizer; given, the steps of fine-tuning in eval mode are counted
            until the targets' mean forget score is back at 95 % of the original's. A model in slices
            is tuned itself, and put back.
        relearn_limit: steps after which relearning gives up.
        params: model -> the parameters whose gradients the cosines compare; all that require grad
            by default.
        removal: "instance" or "class", see `metrics.uis`. For a class, without a retrained model, a
            forget score is to come down to chance (1 over the number of classes in `labels`, 0
            without them); of the test score a target may lose the share of the class in `test`;
            and no membership attack is judged.
        cosine_samples: at most so many samples of the first batch of `forget` and of `retain`, for
            the cosines; later batches are not used. 0 leaves them out.
        title: of the report.
        seed: of the attack.

    Returns:
        The audit, ready for `to_json` and `to_html`.

    Raises:
        ImportError: scikit-learn is missing.
        TypeError: arguments of the wrong kind.
        ValueError: unknown targets or removal, a loader without batches or labels, or losses or
            scores that are not as described.
    """
    check_removal(removal)
    check_whole("cosine_samples", cosine_samples, 0)
    check_whole("relearn_limit", relearn_limit, 1)
    check_whole("seed", seed, 0, 2**32 - 1)
    check_text(title=title)
    _check_optional(relearn=(relearn, "parameters"), params=(params, "model"))
    check_cost(cost)
    went = records(history)
    models = _models(original, unlearned, retrained)
    loaders = {"forget": forget, "retain": retain, "test": test}
    for name, loader in loaders.items():
        check_batches(name, loader)
    reading = Reading(losses, score, outputs, labels, present)
    check_parallel(models)
    _, ranks, _, slicer = parallel(unlearned)
    crew = crew_of(ranks, batches_differ=slicer is None)
    check_shares(models.values(), loaders, crew)
    with untouched(models.values(), loaders.values()):
        splits = _splits(models, loaders, reading, crew)
        chosen = targeted(targets, _tasks(splits))
        cosines = None
        if cosine_samples:
            batches = next(iter(forget)), next(iter(retain))
            mine = _cosines(
                models, batches, reading, chosen, cosine_samples, params, crew.rank == 0
            )
            # a mean of the ranks' cosines is no cosine of a mean: all ranks keep the first's
            cosines = crew.objects("audit: cosines", mine)[0]
        again = None
        # without labels there is no score that could come back
        known = [task for task in chosen if splits["forget"].labelled[task]]
        if relearn and known:
            counts = splits["forget"].counts
            again = relearning.relearn(
                models, forget, reading, known, relearn, relearn_limit, crew, ranks, counts
            )
    scores = _scores(models, splits)
    notes = _unlabelled(splits)
    request = _request(chosen, splits, removal)
    if removal == "class":
        request |= {"chance": chances(splits, chosen, notes), "share": shares(splits, chosen)}
    found = {
        "schema": SCHEMA,
        "version": VERSION,
        "title": title,
        "seed": seed,
        "made": _now(),
        "versions": _versions(),
        "models": list(models),
        "request": request,
        "scores": scores,
        **comparisons(scores, chosen, removal, notes),
        "membership": numbers.attacks(splits, seed, notes),
        "drift": numbers.drifts(splits, _indexed(loaders, notes)),
        "histograms": histograms(splits),
        "loss_levels": loss_aims(splits, chosen, removal),
        "mean_losses": _mean_losses(splits["forget"], chosen),
        "distances": numbers.distances(splits),
        "relearn": again,
        "parameter_shift": parameter_shift(original.parameters(), unlearned.parameters()),
        "cosines": cosines,
        "cost": step_cost(cost, went),
        "history": went,
        "notes": notes,
    }
    data = plain(found)
    return Audit(data | {"verdict": verdict(data)})


def _check_optional(**functions: tuple[object, str]) -> None:
    """Of each name a function, and what it takes, or None."""
    for name, (function, takes) in functions.items():
        if function is not None:
            check_function(name, function, takes)


def _models(
    original: nn.Module, unlearned: nn.Module, retrained: nn.Module | None
) -> dict[str, nn.Module]:
    models = {"original": original, "unlearned": unlearned}
    if retrained is not None:
        models["retrained"] = retrained
    for name, model in models.items():
        check_model(name, model)
    return models


def _splits(
    models: Mapping[str, nn.Module],
    loaders: Mapping[str, Iterable[Any]],
    reading: Reading,
    crew: Crew,
) -> dict[str, Split]:
    found = {}
    for name, loader in loaders.items():
        found[name] = measure(name, models, loader, reading, crew)
    return found


def _tasks(splits: Mapping[str, Split]) -> tuple[str, ...]:
    found = {name: tuple(split.labelled) for name, split in splits.items()}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"losses: found tasks {found}, expected the same on all data; for a task without labels return any finite "
            "loss and a mask of False."
        )
    check_names(found["forget"])
    return found["forget"]


def _scores(models: Iterable[str], splits: Mapping[str, Split]) -> dict[str, Any]:
    """{model: {split: {task: score}}}."""
    found = {}
    for model in models:
        found[model] = {name: split.scores[model] for name, split in splits.items()}
    return found


def _cosines(
    models: Mapping[str, nn.Module],
    batches: tuple[Any, Any],
    reading: Reading,
    targets: Sequence[str],
    samples: int,
    params: Params | None,
    counts: bool,
) -> dict[str, Any]:
    """Gradient cosines of both models on the same batches, which count on one rank."""
    found = {}
    for name in ("original", "unlearned"):
        found[name] = layer_cosines(
            models[name],
            *batches,
            reading,
            targets,
            samples=samples,
            params=params,
            counts=counts or not is_sliced(models[name]),
        )
    return found


def _request(targets: Sequence[str], splits: Mapping[str, Split], removal: str) -> dict[str, Any]:
    tasks = tuple(splits["forget"].labelled)
    kind = "full" if targets == tasks else "partial"
    samples = {name: split.samples for name, split in splits.items()}
    return {
        "kind": kind,
        "removal": removal,
        "tasks": tasks,
        "targets": targets,
        "samples": samples,
    }


def _mean_losses(forget: Split, targets: Sequence[str]) -> dict[str, float]:
    """{target: the original's mean loss on the data to forget}."""
    found = {}
    for task in targets:
        losses = forget.losses["original"][task]
        if len(losses):
            found[task] = float(losses.mean())
    return found


def _indexed(loaders: Mapping[str, object], notes: list[str]) -> dict[str, bool]:
    """Whether a sample's place in the loader names it."""
    found = {name: _in_order(loader) for name, loader in loaders.items()}
    unknown = [name for name, ordered in found.items() if not ordered]
    if unknown:
        notes.append(
            f"Read in an order that may change: {', '.join(unknown)}; the worst samples there have no index (pass a "
            "list of batches, or a DataLoader with shuffle=False and no sampler of its own)."
        )
    return found


def _in_order(loader: object) -> bool:
    """A list, or a DataLoader that goes through its dataset from the first to the last; of others nothing is known."""
    if not isinstance(loader, DataLoader):
        return isinstance(loader, Sequence)
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return False
    return type(sampler_of(loader)) is SequentialSampler


def _unlabelled(splits: Mapping[str, Split]) -> list[str]:
    notes = []
    for name, split in splits.items():
        for task, there in split.labelled.items():
            if not there:
                notes.append(
                    f"No sample of {name} has a label for task {task!r}: its numbers there are left out."
                )
    return notes


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("mtu_fast")
    except PackageNotFoundError:  # a source tree on the path
        ours = "not installed"
    return {"mtu_fast": ours, "torch": torch.__version__, "python": platform.python_version()}
