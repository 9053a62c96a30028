"""Two data sets in one loader: each item is one of the retain set and one of the forget set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

Pair = tuple[Any, Any]


def pairs(retain: Any, forget: Any) -> Dataset[Pair]:
    """Both sets as one of pairs; the retain set may be a stream, even one without end.

    Raises:
        TypeError: no retain set, or a forget set whose length is not known.
        ValueError: a set without an item.
    """
    check_sets(retain, forget)
    if isinstance(retain, IterableDataset) or not hasattr(retain, "__len__"):
        return _StreamedPairs(retain, forget)
    return _Pairs(retain, forget)


def check_sets(retain: Any, forget: Any) -> None:
    """Both are data sets.

    Raises:
        TypeError: no retain set, or a forget set whose length is not known.
        ValueError: a set without an item.
    """
    if retain is None or not hasattr(forget, "__len__"):
        found = (
            "no train_dataset" if retain is None else f"a forget_dataset {type(forget).__name__}"
        )
        raise TypeError(
            f"Trainer: found {found}, expected train_dataset=retain and a forget_dataset with a length."
        )
    if len(forget) == 0:
        raise ValueError("Trainer: found an empty forget_dataset, expected at least one item.")
    if not hasattr(retain, "__getitem__") and not hasattr(retain, "__iter__"):
        found = type(retain).__name__
        raise TypeError(f"Trainer: train_dataset: found {found}, expected a data set or a stream.")
    if hasattr(retain, "__len__") and len(retain) == 0:
        raise ValueError("Trainer: found an empty train_dataset, expected at least one item.")


class _Pairs(Dataset[Pair]):
    """As many as the larger set has; the smaller one is gone through anew."""

    def __init__(self, retain: Sequence[Any], forget: Sequence[Any]) -> None:
        self.retain, self.forget = retain, forget

    def __len__(self) -> int:
        return max(len(self.retain), len(self.forget))

    def __getitem__(self, index: int) -> Pair:
        # the smaller set begins anew, in the order in which items are asked for
        return self.retain[index % len(self.retain)], self.forget[index % len(self.forget)]


class _StreamedPairs(IterableDataset[Pair]):
    """As many as the stream has."""

    def __init__(self, retain: Any, forget: Sequence[Any]) -> None:
        self.retain, self.forget = retain, forget

    def __iter__(self) -> Iterator[Pair]:
        for index, item in enumerate(self.retain):
            yield item, self.forget[index % len(self.forget)]


class Collate:
    """A collator that takes pairs apart: items to retain first, then those to forget, and a mask of both.

    Args:
        collate: what makes a batch of items.
        column: the name of the mask.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], column: str) -> None:
        self.collate, self.column = collate, column

    def __call__(self, items: list[Any]) -> Any:
        """A batch; items of evaluation are no pairs, and go as they are."""
        # the Trainer has one collator for training and evaluation
        if not items or not isinstance(items[0], tuple):
            return self.collate(items)
        retain = [item for item, _ in items]
        forget = [item for _, item in items]
        batch = dict(self.collate(retain + forget))
        # the mask goes by the order above
        batch[self.column] = torch.arange(2 * len(items)) >= len(items)
        return batch
