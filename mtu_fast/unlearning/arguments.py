"""Kinds of the arguments of `unlearn`, `audit` and the scores: an error names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def check_model(name: str, value: object) -> None:
    """It is a module.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: found {type(value).__name__}, expected a torch.nn.Module.")


def check_function(name: str, value: object, takes: str) -> None:
    """It can be called.

    Args:
        name: of the argument.
        value: what was given.
        takes: what it is called with, for the error.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name}: found {type(value).__name__}, expected a function of ({takes}).")


def check_tensors(**values: object) -> None:
    """All are tensors.

    Raises:
        TypeError: one is not.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: found {type(value).__name__}, expected a tensor; torch.as_tensor({name}) makes one of a list."
            )


def check_by_task(name: str, value: object) -> Mapping[str, Any]:
    """What a user's function returned for each task.

    Raises:
        TypeError: it is no mapping.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: found {type(value).__name__}, expected {{task: ...}}.")
    return value


def check_names(tasks: Iterable[object]) -> None:
    """Tasks have strings for names.

    Raises:
        TypeError: one has not.
    """
    odd = [task for task in tasks if not isinstance(task, str)]
    if odd:
        raise TypeError(f"losses: found tasks named {odd}, expected strings: {{str(task): loss}}.")
