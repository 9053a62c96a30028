"""What tells one method from another, as text and numbers that a checkpoint can hold and compare."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor

HOW = (
    "Decorate the class by @dataclass(frozen=True) and declare what it depends on as fields, with "
    "field(compare=False) for what does not tell one run from another; or define describe(self), a dict of numbers "
    "and strings."
)


def identity(method: object) -> dict[str, Any]:
    """{"type": module and name, field: value}.

    Args:
        method: a dataclass whose fields are all that it depends on.

    Returns:
        Strings, numbers, lists and dicts.

    Raises:
        TypeError: its class is no dataclass, it has other attributes than fields, or a field holds
            what has no value to compare.
    """
    kind = type(method)
    name = kind.__qualname__
    # of the class itself: a subclass that is no dataclass has the fields of its base, not its own
    if "__dataclass_fields__" not in vars(kind):
        raise TypeError(
            f"checkpoint: {name} is no dataclass, so nothing tells two of them apart, and one could resume a run of "
            f"another. {HOW}"
        )
    declared = {field.name: field for field in fields(method)}  # type: ignore[arg-type]
    strays = _strays(method, declared)
    if strays:
        raise TypeError(
            f"checkpoint: {name} has the attributes {strays}, which are no fields, so nothing says whether they tell "
            f"one run from another. {HOW}"
        )
    found: dict[str, Any] = {"type": f"{kind.__module__}.{name}"}
    for field in declared.values():
        if field.compare:
            found[field.name] = plain(getattr(method, field.name), f"{name}.{field.name}")
    return found


def _strays(method: object, declared: Mapping[str, Any]) -> list[str]:
    """Attributes of the instance that are neither fields nor kept by a property of the class."""
    held = getattr(method, "__dict__", {})
    return [name for name in held if name not in declared and not hasattr(type(method), name)]


def plain(value: Any, where: str) -> Any:
    """The `value` in strings, numbers, lists and dicts, equal where values are.

    Args:
        value: of a field.
        where: what errors call it.

    Raises:
        TypeError: it is neither plain, nor a container, tensor or dataclass of what is.
    """
    for kind, convert in SIMPLE:
        if isinstance(value, kind):
            return convert(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _container(value, where)
    if "__dataclass_fields__" in vars(type(value)) and not isinstance(value, type):
        return identity(value)
    raise TypeError(
        f"checkpoint: {where} is {type(value).__name__}, which has no value to be compared by. {HOW}"
    )


def _container(value: Any, where: str) -> Any:
    """`plain` of what it holds."""
    if isinstance(value, Mapping):
        return {repr(key): plain(v, f"{where}[{key!r}]") for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    # a set has no order that two processes share
    return sorted(repr(plain(v, where)) for v in value)


def _digest(value: Tensor) -> str:
    entries = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    digest = hashlib.sha256(entries.tobytes()).hexdigest()
    return f"tensor {tuple(value.shape)} {value.dtype} {digest}"


# The first that fits. Numbers of numpy, which a checkpoint would not read back, become Python's.
SIMPLE: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (type(None), lambda value: value),
    (Enum, lambda value: f"{type(value).__qualname__}.{value.name}"),
    (bool, bool),
    (str, str),
    (int, int),
    (float, float),
    (torch.dtype, str),
    (torch.device, str),
    (torch.Generator, lambda value: f"torch.Generator on {value.device}"),  # held with its state
    (Tensor, _digest),
)
