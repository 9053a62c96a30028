"""Two data sets in one loader: each item is one of the retain set and one of the forget set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info


@dataclass(frozen=True)
class Pair:
    """An item to retain and one to forget; a class of its own, since items may be tuples."""

    retain: Any
    forget: Any


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
    if retain is None:
        raise TypeError(
            "train_dataset: found None, expected the data to retain beside forget_dataset."
        )
    if not hasattr(forget, "__len__"):
        found = type(forget).__name__
        raise TypeError(f"forget_dataset: found {found}, expected a data set with a length.")
    if len(forget) == 0:
        raise ValueError("found an empty forget_dataset, expected at least one item.")
    if not hasattr(retain, "__getitem__") and not hasattr(retain, "__iter__"):
        found = type(retain).__name__
        raise TypeError(f"train_dataset: found {found}, expected a data set or a stream.")
    if hasattr(retain, "__len__") and len(retain) == 0:
        raise ValueError("found an empty train_dataset, expected at least one item.")


def check_sampling(args: Any) -> None:
    """Items are not sampled by their lengths: a pair has two.

    Raises:
        ValueError: they are.
    """
    found = getattr(args, "train_sampling_strategy", "random")
    if found not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy: found {found!r} beside forget_dataset=, expected 'random' or 'sequential': it "
            "goes by the length of an item, and an item of two data sets is one of each. With one data set and a "
            "forget column it works."
        )


class _Pairs(Dataset[Pair]):
    """As many as the larger set has; the smaller one is gone through anew."""

    def __init__(self, retain: Sequence[Any], forget: Sequence[Any]) -> None:
        self.retain, self.forget = retain, forget

    def __len__(self) -> int:
        return max(len(self.retain), len(self.forget))

    def __getitem__(self, index: int) -> Pair:
        # by index, whatever the order of a sampler: item i of the larger set meets i mod n of the smaller
        return Pair(self.retain[index % len(self.retain)], self.forget[index % len(self.forget)])


class _StreamedPairs(IterableDataset[Pair]):
    """As many as the stream has, or as the forget set has: a shorter stream is gone through anew."""

    def __init__(self, retain: Any, forget: Sequence[Any]) -> None:
        self.retain, self.forget = retain, forget

    def __iter__(self) -> Iterator[Pair]:
        chosen = _share(len(self.forget))
        index = 0
        for item in self.retain:
            yield Pair(item, self.forget[chosen[index % len(chosen)]])
            index += 1
        while index < len(chosen):
            start = index
            for item in self.retain:
                yield Pair(item, self.forget[chosen[index]])
                index += 1
                if index == len(chosen):
                    return
            _check_repeats(index - start, index, len(chosen))


def _share(count: int) -> Sequence[int]:
    """The items to forget that this worker of a loader pairs: each has a share of the stream, and one of these."""
    worker = get_worker_info()
    if worker is None or count < worker.num_workers:
        return range(count)
    return range(worker.id, count, worker.num_workers)


def _check_repeats(repeated: int, before: int, wanted: int) -> None:
    if repeated == 0:
        raise ValueError(
            f"train_dataset: found a stream that ended after {before} items and did not begin anew, expected at least "
            f"{wanted}, as forget_dataset has (shared out to workers), or one that can be gone through again: an "
            "IterableDataset whose __iter__ starts anew, with items for each of dataloader_num_workers."
        )


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
        if not items or not isinstance(items[0], Pair):
            return self.collate(items)
        retain = [self._of_side(item.retain, "train_dataset", 0) for item in items]
        forget = [self._of_side(item.forget, "forget_dataset", 1) for item in items]
        batch = dict(self.collate(retain + forget))
        # the mask goes by the order above
        batch[self.column] = torch.arange(2 * len(items)) >= len(items)
        return batch

    def _of_side(self, item: Any, name: str, side: int) -> Any:
        """An item without the column, whose place the mask takes.

        Raises:
            ValueError: the column says the opposite.
        """
        if not isinstance(item, Mapping) or self.column not in item:
            return item
        said = _number(item[self.column])
        if said is not None and bool(said) != bool(side):
            raise ValueError(
                f"{name}: found an item with {self.column!r} = {said}, expected {side} or no such column: beside "
                "forget_dataset= all of train_dataset is to be retained, and all of forget_dataset to be forgotten. "
                "Leave out forget_dataset=, take these items out, or name another forget_column=."
            )
        return {key: value for key, value in item.items() if key != self.column}


def _number(value: Any) -> float | None:
    """A flag of torch, numpy or Python as a number; None of anything else."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return value if isinstance(value, int | float) else None
