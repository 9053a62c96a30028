"""What loaders draw from: their samplers, and the generators of these."""

from __future__ import annotations

from typing import Any

import torch


def sampler_of(loader: Any) -> Any:
    """The sampler that gives single samples; None where the loader has none."""
    batches = getattr(loader, "batch_sampler", None)
    holder = loader if batches is None else batches
    return getattr(holder, "sampler", None)


def generators_of(*loaders: object) -> list[torch.Generator]:
    """The generators that loaders and their samplers draw their order from, each once."""
    found = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        outer = getattr(loader, "sampler", None)
        for holder in (loader, outer, batches, sampler_of(loader)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
