"""Labelled images in memory, and what a data set must offer to be unlearned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Index = Tensor | slice
Self = TypeVar("Self")


@dataclass(frozen=True)
class Samples:
    """N images: `image` [N, C, H, W] in 0..1, `labels` {task: [N, ...]}, `source` [N, ...] what each was made from."""

    image: Tensor
    labels: dict[str, Tensor]
    source: Tensor

    def __len__(self) -> int:
        """N."""
        return self.image.shape[0]

    def __getitem__(self, index: Index) -> Samples:
        """The samples at `index` ([n] int64, [N] bool, or a slice)."""
        labels = {task: label[index] for task, label in self.labels.items()}
        return Samples(self.image[index], labels, self.source[index])

    def subset(self, index: Index) -> Samples:
        """The same as indexing: they are in memory already."""
        return self[index]


class Dataset(Protocol):
    """Samples that are read when they are indexed; a subset is not read yet."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Index, /) -> Samples: ...

    def subset(self: Self, index: Index, /) -> Self: ...


def concat(*parts: Samples) -> Samples:
    """The samples of all `parts`, in order; their tasks are the same."""
    labels = {task: torch.cat([p.labels[task] for p in parts]) for task in parts[0].labels}
    return Samples(
        torch.cat([p.image for p in parts]), labels, torch.cat([p.source for p in parts])
    )
