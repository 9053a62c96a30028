"""What loaders say of their data: samples in both sets, a forget set that is most of everything."""

from __future__ import annotations

import warnings
from typing import Any

from torch.utils.data import Dataset, RandomSampler, SequentialSampler, Subset, SubsetRandomSampler

SHARE = 0.5


def check_data(forget: object, retain: object) -> None:
    """No sample is in both sets, and the forget set is at most half of the data, as far as the loaders tell.

    Known are DataLoaders over one dataset, through any number of `Subset`s, with torch's own samplers.

    Raises:
        ValueError: samples are in both.
    """
    one, other = _indices(forget), _indices(retain)
    if one is None or other is None:
        return
    if one[0] is other[0]:
        both = one[1] & other[1]
        if both:
            raise ValueError(
                f"forget and retain: {len(both)} samples are in both ({len(one[1])} to forget, {len(other[1])} to "
                f"retain; dataset indices {sorted(both)[:5]}{', ...' if len(both) > 5 else ''}). Take them out of "
                "retain; what targets=... leaves of the forget samples' tasks is retained without that."
            )
    total = len(one[1]) + len(other[1])
    if len(one[1]) > SHARE * total:
        warnings.warn(
            f"forget: {len(one[1])} of {total} samples are to be forgotten, more than half of all. Retraining on the "
            f"{len(other[1])} others is likely cheaper and is exact.", UserWarning, stacklevel=4,
        )  # fmt: skip


def _indices(loader: Any) -> tuple[object, set[int]] | None:
    """The dataset at the bottom, and which of its samples a loader draws; None where that cannot be told."""
    dataset = getattr(loader, "dataset", None)
    sampler = getattr(loader, "sampler", None)
    if getattr(loader, "batch_sampler", None) is not None:
        sampler = getattr(loader.batch_sampler, "sampler", None)
    if not isinstance(dataset, Dataset) or not hasattr(dataset, "__len__"):
        return None
    if isinstance(sampler, SubsetRandomSampler):
        drawn = [int(i) for i in sampler.indices]
    elif isinstance(sampler, SequentialSampler | RandomSampler):
        drawn = list(range(len(dataset)))
    else:
        return None
    while isinstance(dataset, Subset):
        below = dataset.indices
        drawn, dataset = [int(below[i]) for i in drawn], dataset.dataset
    return dataset, set(drawn)
