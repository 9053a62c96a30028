"""Kinds of the arguments of `unlearn` and `audit`: an error names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mtu_fast._arguments import shown

# that can be iterated, but not over batches
NO_LOADERS = (str, bytes, Tensor, np.ndarray, Mapping, set, frozenset)


def check_model(name: str, value: object) -> None:
    """It is a module.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: found {type(value).__name__}, expected a torch.nn.Module.")


def check_names(tasks: Iterable[object]) -> None:
    """Tasks have strings for names.

    Raises:
        TypeError: one has not.
    """
    odd = [task for task in tasks if not isinstance(task, str)]
    if odd:
        raise TypeError(f"losses: found tasks named {odd}, expected strings: {{str(task): loss}}.")


def check_optimizer(name: str, value: object) -> None:
    """It is an optimizer.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, torch.optim.Optimizer):
        raise TypeError(f"{name}: found {type(value).__name__}, expected a torch.optim.Optimizer.")


def check_loader(name: str, loader: object) -> None:
    """A loader can be iterated again and again, by several iterators at a time.

    Raises:
        TypeError: it cannot be iterated, or only once.
        ValueError: its iterators share their workers.
    """
    if isinstance(loader, NO_LOADERS) or not isinstance(loader, Iterable):
        raise TypeError(
            f"{name}: found {type(loader).__name__}, expected a DataLoader or a list of batches."
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            f"{name}: found {type(loader).__name__}, which can be iterated once only, expected a DataLoader or a list "
            "of batches: each pass takes a fresh iterator."
        )
    if getattr(loader, "persistent_workers", False):
        raise ValueError(
            f"{name}: persistent_workers=True gives all iterators the same workers, so that an evaluation would start "
            "the current pass anew; build this loader with persistent_workers=False."
        )


def several(generators: Iterable[torch.Generator]) -> tuple[torch.Generator, ...]:
    """Generators of random numbers.

    Raises:
        TypeError: one alone, or something else.
    """
    if isinstance(generators, torch.Generator):
        raise TypeError(
            "generators: found one torch.Generator, expected several, (generator,) for this one."
        )
    if isinstance(generators, str | Tensor) or not isinstance(generators, Iterable):
        raise TypeError(f"generators: found {shown(generators)}, expected several torch.Generator.")
    found = tuple(generators)
    for draw in found:
        if not isinstance(draw, torch.Generator):
            raise TypeError(
                f"generators: found {type(draw).__name__}, expected several torch.Generator."
            )
    return found
