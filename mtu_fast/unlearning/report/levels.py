"""What forgetting is to reach: the score and the loss of each target, and what a removed class changes about them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mtu_fast.unlearning.report.split import Labels, Split

Levels = dict[str, float]


def aims(data: Mapping[str, Any]) -> Levels:
    """What a forget score is to come down to, for each target.

    The retrained model's forget score; without one the original's test score; for a class without
    one chance, since test data may hold the class. A target without labels among the data to
    forget, or among those of its reference, has none.
    """
    scores, request = data["scores"], data["request"]
    reference = scores["original"]["test"]
    if "retrained" in scores:
        reference = scores["retrained"]["forget"]
    elif of_class(request):
        reference = request["chance"]
    before = scores["original"]["forget"]
    found = {}
    for task in request["targets"]:
        if before[task] is not None and reference[task] is not None:
            found[task] = reference[task]
    return found


def of_class(request: Mapping[str, Any]) -> bool:
    """Whether a class was removed; an audit of an earlier version does not say, and is read as of instances."""
    return bool(request.get("removal") == "class")


def guessed(data: Mapping[str, Any]) -> bool:
    """Whether chance is the reference: of a class, without a retrained model."""
    return of_class(data["request"]) and "retrained" not in data["scores"]


def loss_aims(splits: Mapping[str, Split], targets: Sequence[str], removal: str) -> Levels:
    """{target: mean loss to reach}: the retrained model's on the data to forget, or the original's on unseen data.

    Of a class without a retrained model nothing is known.
    """
    forget = splits["forget"].losses
    if "retrained" in forget:
        losses = forget["retrained"]
    elif removal == "class":
        # the losses of a class never seen are known from a retrained model alone
        return {}
    else:
        losses = splits["test"].losses["original"]
    return {task: float(losses[task].mean()) for task in targets if len(losses[task])}


def chances(
    splits: Mapping[str, Split], targets: Sequence[str], notes: list[str]
) -> dict[str, float]:
    """{target: score of a guess, 1 over the number of classes}; 0 where no labels were given.

    Args:
        splits: whose labels are counted.
        targets: the tasks that a class is removed from.
        notes: to which it is added what was not known.

    Returns:
        The chance of each target.
    """
    found = {}
    for task in targets:
        classes = set[Hashable]()
        for split in splits.values():
            classes |= set(_values(split.labels.get(task, [])))
        found[task] = 1 / len(classes) if classes else 0.0
        if not classes:
            notes.append(
                f"Chance in task {task!r} is taken as 0: no labels were given to count its classes by."
            )
    return found


def shares(splits: Mapping[str, Split], targets: Sequence[str]) -> dict[str, float | None]:
    """{target: share of the test samples that are of a class of the data to forget}; None without labels."""
    found: dict[str, float | None] = {}
    for task in targets:
        gone = set(_values(splits["forget"].labels.get(task, [])))
        test = _values(splits["test"].labels.get(task, []))
        found[task] = None
        if gone and test:
            found[task] = sum(label in gone for label in test) / len(test)
    return found


def _values(labels: Labels | Iterable[Any]) -> list[Any]:
    if isinstance(labels, Tensor):
        found: list[Any] = labels.tolist()
        return found
    return list(labels)
