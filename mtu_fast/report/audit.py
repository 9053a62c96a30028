"""The audit: original, unlearned and perhaps retrained model on forget, retain and test data."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast.metrics import parameter_shift, relearn_steps
from mtu_fast.report import numbers
from mtu_fast.report.cosines import Params, layer_cosines
from mtu_fast.report.passes import PerTask, Reading, Split, measure, untouched
from mtu_fast.report.result import SCHEMA, VERSION, Audit
from mtu_fast.report.verdict import verdict

BACK = 0.95  # share of the original's forget score from which it counts as back; the last bit takes as long as it likes

Optimizer = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


def audit(
    original: nn.Module,
    unlearned: nn.Module,
    retrained: nn.Module | None = None,
    *,
    forget: Iterable[Any],
    retain: Iterable[Any],
    test: Iterable[Any],
    losses: Callable[[nn.Module, Any], PerTask],
    score: Callable[[nn.Module, Any], Mapping[str, float]],
    targets: Iterable[str] | None = None,
    outputs: Callable[[nn.Module, Any], PerTask] | None = None,
    labels: Callable[[Any], PerTask] | None = None,
    present: Callable[[Any], PerTask] | None = None,
    history: object = None,
    cost: Mapping[str, Any] | None = None,
    relearn: Optimizer | None = None,
    relearn_limit: int = 200,
    params: Params | None = None,
    removal: str = "instance",
    cosine_samples: int = 16,
    title: str = "Unlearning audit",
    seed: int = 0,
) -> Audit:
    """What was removed, and what else moved: every score of `mtu_fast.metrics`, sample by sample where it matters.

    The models are put in eval mode and back; their parameters, buffers, `.grad`, modes and torch's random state are as
    before in the end. Each loader is read once by all models together, so that samples are paired under any order,
    once per model by `score`, and, for its first batch, by the gradient cosines. The thresholds of the verdict are our
    choice and are listed in it.

    Args:
        original: the model before.
        unlearned: the model after.
        retrained: the ideal, trained without the data; gaps, ToW, over-forgetting and distances need it.
        forget: batches of the data to forget, readable again and again.
        retain: batches of the data to keep.
        test: batches never seen by any of the models.
        losses: (model, batch) -> {task: [N]}, unreduced.
        score: (model, loader) -> {task: score}, higher better.
        targets: tasks to forget from; None: all (full-task).
        outputs: (model, batch) -> {task: logits [N, C, ...]} of the classification tasks, for entropy and KL.
        labels: batch -> {task: [N] integers}, for the worst class; tasks without one are left out.
        present: batch -> {task: [N] bool}, False where a sample has no label for the task.
        history: anything with `.records`, a list of mappings or dataclasses with `step` and numbers or {task: number}.
        cost: {what: number}, or {what: {variant: number}}: ms a step and peak MiB, say.
        relearn: parameters -> optimizer; given, the steps of fine-tuning in eval mode are counted until the targets'
            mean forget score is back at 95 % of the original's.
        relearn_limit: steps after which relearning gives up.
        params: model -> the parameters whose gradients the cosines compare; all that require grad by default.
        removal: "instance" or "class", see `metrics.uis`.
        cosine_samples: samples of either side for the cosines; 0 leaves them out.
        title: of the report.
        seed: of the attack.

    Returns:
        The audit, ready for `to_json` and `to_html`.

    Raises:
        ImportError: scikit-learn is missing.
        TypeError: arguments of the wrong kind.
        ValueError: unknown targets, an empty loader, or losses or scores that are not as described.
    """
    models = {"original": original, "unlearned": unlearned} | ({} if retrained is None else {"retrained": retrained})
    loaders = {"forget": forget, "retain": retain, "test": test}
    reading = Reading(losses, score, outputs, labels, present)
    notes: list[str] = []
    with untouched(models.values(), loaders.values()), torch.no_grad():
        splits = {name: measure(name, models, loader, reading) for name, loader in loaders.items()}
        chosen = _targets(targets, splits["forget"])
        cosines = {
            model: layer_cosines(models[model], next(iter(forget)), next(iter(retain)), reading, chosen,
                                 samples=cosine_samples, params=params)
            for model in ("original", "unlearned") if cosine_samples
        }  # fmt: skip
        again = None if relearn is None else _relearn(models, forget, reading, chosen, relearn, relearn_limit)
    scores = {model: {name: split.scores[model] for name, split in splits.items()} for model in models}
    went = numbers.records(history)
    data = numbers.plain({
        "schema": SCHEMA, "version": VERSION, "title": title, "seed": seed, "made": _now(), "versions": _versions(),
        "models": list(models), "request": _request(chosen, splits), "scores": scores,
        **numbers.comparisons(scores, chosen, removal, notes),
        "membership": numbers.attacks(splits, seed, notes), "drift": numbers.drifts(splits, _indexed(loaders, notes)),
        "histograms": numbers.histograms(splits), "distances": numbers.distances(splits), "relearn": again,
        "parameter_shift": parameter_shift(original.parameters(), unlearned.parameters()), "cosines": cosines or None,
        "cost": numbers.step_cost(cost, went), "history": went, "notes": notes,
    })  # fmt: skip
    return Audit(data | {"verdict": verdict(data)})


def _targets(targets: Iterable[str] | None, split: Split) -> list[str]:
    """The target tasks in the order of the losses."""
    tasks = list(split.losses["original"])
    if set(split.scores["original"]) != set(tasks):
        raise ValueError(f"score gives tasks {sorted(split.scores['original'])}, losses {tasks}; expected the same.")
    if isinstance(targets, str):
        targets = [targets]
    wanted = set(tasks if targets is None else targets)
    if not wanted or not wanted <= set(tasks):
        raise ValueError(f"targets: found {sorted(wanted)}, expected at least one of the tasks {tasks}.")
    return [task for task in tasks if task in wanted]


def _request(targets: list[str], splits: Mapping[str, Split]) -> dict[str, Any]:
    tasks = list(splits["forget"].losses["original"])
    kind = "full" if targets == tasks else "partial"
    samples = {name: split.samples for name, split in splits.items()}
    return {"kind": kind, "tasks": tasks, "targets": targets, "samples": samples}


def _indexed(loaders: Mapping[str, object], notes: list[str]) -> dict[str, bool]:
    """Whether a sample's place in the loader names it."""
    shuffled = [
        name for name, loader in loaders.items()
        if isinstance(getattr(loader, "sampler", None), torch.utils.data.RandomSampler)
    ]  # fmt: skip
    if shuffled:
        names = ", ".join(shuffled)
        notes.append(f"Shuffled when read: {names}; the worst samples there have no index (use shuffle=False).")
    return {name: name not in shuffled for name in loaders}


def _relearn(
    models: Mapping[str, nn.Module], forget: Iterable[Any], reading: Reading, targets: Sequence[str],
    optimizer: Optimizer, limit: int,
) -> dict[str, int | None]:  # fmt: skip
    """Steps of the unlearned and of the retrained model until the targets' mean forget score is back."""

    def of_targets(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {task: loss for task, loss in reading.losses(model, batch).items() if task in targets}

    def level(model: nn.Module) -> float:
        with torch.no_grad():
            found = reading.score(model, forget)
        return sum(found[task] for task in targets) / len(targets)

    goal = level(models["original"])
    goal -= (1 - BACK) * abs(goal)
    with torch.enable_grad():
        return {
            name: relearn_steps(model, forget, of_targets, level, goal, optimizer, limit=limit)
            for name, model in models.items() if name != "original"
        }  # fmt: skip


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("mtu_fast")
    except PackageNotFoundError:  # a source tree on the path
        ours = "not installed"
    return {"mtu_fast": ours, "torch": torch.__version__, "python": platform.python_version()}
