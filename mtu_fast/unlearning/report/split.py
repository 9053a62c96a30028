"""What one loader's samples gave under every model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

PerModel = dict[str, dict[str, Tensor]]
Labels = Tensor | list[Any]


@dataclass
class Split:
    """What was measured on one loader: {model: {task: ...}}, or {task: ...} where no single model decides.

    Attributes:
        samples: N of the loader.
        scores: {model: {task: score}}; None where no sample has a label for the task.
        losses: {model: {task: [n]}} float64, of the samples that have a label for the task; n may
            be 0.
        entropy: likewise, of the tasks that `outputs` names.
        kl, distance: {task: [n]} between retrained and unlearned.
        labels: {task: [n]}.
        index: {task: [n]}, each sample's place in the loader.
        counts: {task: labelled samples} of each process's loader.
    """

    samples: int = 0
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    losses: PerModel = field(default_factory=dict)
    entropy: PerModel = field(default_factory=dict)
    kl: dict[str, Tensor] = field(default_factory=dict)
    distance: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, Labels] = field(default_factory=dict)
    index: dict[str, Tensor] = field(default_factory=dict)
    counts: list[dict[str, int]] = field(default_factory=list)

    @property
    def labelled(self) -> dict[str, bool]:
        """{task: whether a sample has a label for it}, all tasks in the order of the losses."""
        return {task: len(at) > 0 for task, at in self.index.items()}

    @property
    def others(self) -> list[str]:
        """The models beside the original."""
        return [model for model in self.losses if model != "original"]

    def values(self, by: str) -> PerModel:
        """What an attacker sees of each sample: its "loss" or its "entropy"."""
        if by == "loss":
            return self.losses
        return self.entropy


class Parts:
    """Pieces of vectors, a batch each, by quantity, model ("" for none) and task."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], dict[str, list[Tensor]]] = {}
        self._labels: dict[str, list[Labels]] = {}

    def add(self, quantity: str, task: str, value: Tensor, model: str = "") -> None:
        """One batch's piece."""
        tasks = self._found.setdefault((quantity, model), {})
        # on the CPU: a whole data set's values may not fit beside the models
        tasks.setdefault(task, []).append(value.detach().cpu())

    def add_labels(self, task: str, labels: Labels) -> None:
        """One batch's classes."""
        self._labels.setdefault(task, []).append(labels)

    def labels(self) -> dict[str, Labels]:
        """{task: the classes of all samples}: a tensor where all batches gave one, a list otherwise."""
        found: dict[str, Labels] = {}
        for task, pieces in self._labels.items():
            tensors = [piece for piece in pieces if isinstance(piece, Tensor)]
            if len(tensors) == len(pieces):
                found[task] = torch.cat(tensors)
            else:
                found[task] = list(chain.from_iterable(pieces))
        return found

    def shift(self, by: int) -> None:
        """Places of samples in the loaders of all ranks, laid end to end."""
        for pieces in self._found.get(("index", ""), {}).values():
            for piece in pieces:
                # in place: these are this process's own copies
                piece += by

    def take(self, other: Parts) -> None:
        """The pieces of another rank behind these."""
        for key, tasks in other._found.items():
            mine = self._found.setdefault(key, {})
            for task, pieces in tasks.items():
                mine.setdefault(task, []).extend(pieces)
        for task, classes in other._labels.items():
            self._labels.setdefault(task, []).extend(classes)

    def joined(self, quantity: str, model: str = "") -> dict[str, Tensor]:
        """{task: all pieces as one vector}."""
        pieces = self._found.get((quantity, model), {})
        return {task: torch.cat(values) for task, values in pieces.items()}

    def split(self, samples: int, models: Iterable[str]) -> Split:
        """Everything that was added, without scores."""
        found = Split(samples)
        for model in models:
            found.losses[model] = self.joined("loss", model)
            found.entropy[model] = self.joined("entropy", model)
        found.kl, found.distance = self.joined("kl"), self.joined("distance")
        found.labels, found.index = self.labels(), self.joined("index")
        return found
