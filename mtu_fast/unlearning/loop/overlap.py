"""What loaders say of their data: samples in two sets, a forget set that is most of everything."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler, SequentialSampler, Subset, SubsetRandomSampler
from torch.utils.data import WeightedRandomSampler as Weighted

from mtu_fast._checks.warned import warn
from mtu_fast.unlearning.loaders import sampler_of

SHARE = 0.5
MEMORY = object()  # what batches of tensors and of other objects are samples of
ATOMS = (str, bytes, int, float, complex, type(None))  # equal ones may be one object
WAYS = {
    "retain": "Take them out of retain; what targets=... leaves of the forget samples' tasks is retained without that.",
    "validation": "The level at which to stop is that of data never seen: take them out of validation.",
}
PAIRS = (("forget", "retain"), ("forget", "validation"), ("retain", "validation"))
Samples = tuple[object, set[Hashable]]  # what they are samples of, and which


def check_data(forget: object, retain: object, validation: object = None) -> None:
    """No sample is in two of the sets, as far as the loaders tell.

    Known are DataLoaders over one dataset, through any number of `Subset`s, with torch's own
    samplers; and lists of batches of the same tensors, or views of the same memory, or the same
    objects.

    Args:
        forget: the data to forget.
        retain: the data to keep.
        validation: data never seen: its scores are the level at which to stop, so neither of the
            others may be in it.

    Raises:
        ValueError: samples are in two.
    """
    known = {
        "forget": _samples(forget),
        "retain": _samples(retain),
        "validation": _samples(validation),
    }
    for one, other in PAIRS:
        mine, theirs = known[one], known[other]
        if mine is None or theirs is None or mine[0] is not theirs[0]:
            continue
        both = mine[1] & theirs[1]
        if both:
            raise ValueError(
                f"{one} and {other}: {len(both)} {_what(mine[0])} are in both ({len(mine[1])} in {one}, "
                f"{len(theirs[1])} in {other}; {_which(mine[0], both)}). {WAYS[other]}"
            )


def _what(source: object) -> str:
    if source is MEMORY:
        return "samples (or batches, where they are no tensors)"
    return "samples"


def _which(source: object, both: set[Hashable]) -> str:
    if source is MEMORY:
        return "by their place in memory"
    first = sorted(i for i in both if isinstance(i, int))[:5]
    more = ", ..." if len(both) > len(first) else ""
    return f"dataset indices {first}{more}"


def check_share(forget: int, retain: int | None) -> None:
    """Warn where most samples are to be forgotten.

    Args:
        forget: samples to forget.
        retain: samples to keep; None where nobody knows.
    """
    if retain is not None and forget > SHARE * (forget + retain):
        warn(
            f"forget: {forget} of {forget + retain} samples are to be forgotten, more than half of all. Retraining on "
            f"the {retain} others is likely cheaper and is exact.",
        )


def _samples(loader: Any) -> Samples | None:
    """Which samples a loader draws, and of what; None where that cannot be told."""
    # A list's own batches live as long as it does; what another container makes on the way may
    # share an address.
    if type(loader) in (list, tuple):
        return MEMORY, {key for batch in loader for key in _places(batch)}
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Dataset) or not hasattr(dataset, "__len__"):
        return None
    drawn = _drawn(sampler_of(loader), len(dataset))
    if drawn is None:
        return None
    return _within(dataset, drawn)


def _drawn(sampler: object, length: int) -> list[int] | None:
    """The indices that one of torch's samplers draws; None for any other sampler."""
    if isinstance(sampler, SubsetRandomSampler):
        return list(map(int, sampler.indices))
    if isinstance(sampler, Weighted):
        # what has weight 0 is never drawn
        return torch.as_tensor(sampler.weights).nonzero().flatten().tolist()
    if isinstance(sampler, SequentialSampler | RandomSampler):
        # with or without replacement: each index may be drawn
        return list(range(length))
    return None


def _within(dataset: Dataset[Any], indices: list[int]) -> Samples:
    """The dataset below all subsets, and the indices there."""
    while isinstance(dataset, Subset):
        indices = [int(dataset.indices[i]) for i in indices]
        dataset = dataset.dataset
    return dataset, set(indices)


def _places(batch: Any) -> list[Hashable]:
    """Where each sample of a batch lies: the addresses of all its parts; of a batch of something else, its identity.

    All parts together, since unlike samples may share one: for example a tensor of equal labels.
    """
    tensors = [t for t in _tensors(batch) if t.dim() and t.numel()]
    lengths = set(map(len, tensors))
    dense = all(t.layout is torch.strided for t in tensors)
    if dense and len(lengths) == 1:
        return [tuple(_place(t, i) for t in tensors) for i in range(lengths.pop())]
    if isinstance(batch, ATOMS):
        return []
    return [id(batch)]


def _place(t: Tensor, i: int) -> Hashable:
    # shape and dtype too: a view may begin where another one does
    return t.device, t.data_ptr() + i * t.stride(0) * t.element_size(), t.shape[1:], t.dtype


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from _tensors(list(batch.values()))
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _tensors(part)
