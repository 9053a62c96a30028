"""What loaders say of their data: samples in two sets, a forget set that is most of everything."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler, SequentialSampler, Subset, SubsetRandomSampler
from torch.utils.data import WeightedRandomSampler as Weighted

from mtu_fast.unlearning.loaders import sampler_of

SHARE = 0.5
MEMORY = object()  # what batches of tensors and of other objects are samples of
ATOMS = (str, bytes, int, float, complex, type(None))  # equal ones may be one object
WAYS = {
    "retain": "Take them out of retain; what targets=... leaves of the forget samples' tasks is retained without that.",
    "validation": "The level at which to stop is that of data never seen: take them out of validation.",
}
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
    for one, other in (("forget", "retain"), ("forget", "validation"), ("retain", "validation")):
        mine, theirs = known[one], known[other]
        if mine is None or theirs is None or mine[0] is not theirs[0]:
            continue
        both = mine[1] & theirs[1]
        if both:
            what, at = "samples (or batches, where they are no tensors)", "by their place in memory"
            if mine[0] is not MEMORY:
                what = "samples"
                first = sorted(i for i in both if isinstance(i, int))[:5]
                at = f"dataset indices {first}{', ...' if len(both) > len(first) else ''}"
            raise ValueError(
                f"{one} and {other}: {len(both)} {what} are in both ({len(mine[1])} in {one}, {len(theirs[1])} in "
                f"{other}; {at}). {WAYS[other]}"
            )


def check_share(forget: int, retain: int | None) -> None:
    """Warn where most samples are to be forgotten.

    Args:
        forget: samples to forget.
        retain: samples to keep; None where nobody knows.
    """
    if retain is not None and forget > SHARE * (forget + retain):
        warnings.warn(
            f"forget: {forget} of {forget + retain} samples are to be forgotten, more than half of all. Retraining on "
            f"the {retain} others is likely cheaper and is exact.", UserWarning, stacklevel=5,
        )  # fmt: skip


def _samples(loader: Any) -> Samples | None:
    """Which samples a loader draws, and of what; None where that cannot be told."""
    # A list's own batches live as long as it does; what another container makes on the way may
    # share an address.
    if type(loader) in (list, tuple):
        return MEMORY, {key for batch in loader for key in _places(batch)}
    dataset = getattr(loader, "dataset", None)
    sampler = sampler_of(loader)
    if not isinstance(dataset, Dataset) or not hasattr(dataset, "__len__"):
        return None
    if isinstance(sampler, SubsetRandomSampler):
        drawn = [int(i) for i in sampler.indices]
    elif isinstance(sampler, Weighted):
        drawn = torch.as_tensor(sampler.weights).nonzero().flatten().tolist()
    elif isinstance(sampler, SequentialSampler | RandomSampler):
        drawn = list(range(len(dataset)))
    else:
        return None
    while isinstance(dataset, Subset):
        below = dataset.indices
        drawn, dataset = [int(below[i]) for i in drawn], dataset.dataset
    return dataset, set(drawn)


def _places(batch: Any) -> list[Hashable]:
    """Where each sample of a batch lies: the addresses of all its parts; of a batch of something else, its identity.

    All parts together, since unlike samples may share one: a tensor of equal labels, say.
    """
    tensors = [t for t in _tensors(batch) if t.dim() and t.numel()]
    lengths = {len(t) if t.layout is torch.strided else None for t in tensors}
    count = lengths.pop() if len(lengths) == 1 else None
    if count is not None:
        return [tuple(_place(t, i) for t in tensors) for i in range(count)]
    return [] if isinstance(batch, ATOMS) else [id(batch)]


def _place(t: Tensor, i: int) -> Hashable:
    return t.device, t.data_ptr() + i * t.stride(0) * t.element_size(), t.shape[1:], t.dtype


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        parts: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
        for part in parts:
            yield from _tensors(part)
