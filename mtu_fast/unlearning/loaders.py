"""What loaders draw from, how long they say they are, and one pass over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from mtu_fast._checks.warned import warn

MANY = 10_000  # batches in one pass of a loader of unknown length, after which a warning comes


def sampler_of(loader: Any) -> Any:
    """The sampler that gives single samples; None where the loader has none."""
    batches = getattr(loader, "batch_sampler", None)
    # beside a batch_sampler of one's own, torch gives the loader a sampler that is not used
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


def length_of(loader: Any) -> int | None:
    """How many batches, or samples of a dataset, there are; None where it does not know."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError, ValueError, OverflowError):
        return None  # below zero, or beyond all that can be counted, is no length either


def begun(name: str, loader: Iterable[Any]) -> Iterator[Any]:
    """A fresh iterator of a loader.

    Raises:
        TypeError: it gives none.
    """
    try:
        return iter(loader)
    except TypeError as error:
        raise TypeError(
            f"{name}: found {type(loader).__name__}, expected a loader that gives an iterator: {error}"
        ) from error


def one_pass(name: str, loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a pass that is to be read to its end, which should have one.

    Args:
        name: what errors call the loader.
        loader: of batches.

    Yields:
        Each batch.

    Raises:
        TypeError: the loader gives no iterator.
        ValueError: there are more than twice as many as the loader says.
    """
    length = length_of(loader)
    for count, batch in enumerate(begun(name, loader), 1):
        if length is None and count == MANY:
            warn(
                f"{name}: an evaluation has read {MANY} batches of this loader, which does not know its length. If it "
                "never ends, pass a part of it (of retain as monitor=).",
            )
        # a length may be an estimate: only far beyond it is it no end
        if length is not None and count > 2 * length + 100:
            raise ValueError(
                f"{name}: the loader has given {count} batches in one pass, but len(loader) is {length}. Does it end? "
                "An evaluation reads all of it: pass a part of it (of retain as monitor=)."
            )
        yield batch
