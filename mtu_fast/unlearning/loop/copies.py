"""Copies of states, of values that a file can hold and give back without running code."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ATOMS = (str, bytes, int, float, bool, torch.dtype, torch.device, type(None))


def copied(value: Any, where: str = "", *, strict: bool = True) -> Any:
    """A copy that shares no memory with the value, of tensors, numbers, strings and their containers.

    Args:
        value: a state.
        where: what errors call it.
        strict: whether to refuse anything else, which could not be read back safely.

    Raises:
        TypeError: something else is in it.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    # exactly these: numpy's float64 is a float too, and could not be read back
    if type(value) in ATOMS:
        return value
    if isinstance(value, Mapping):
        return _mapping(value, where, strict)
    if isinstance(value, list | tuple):
        parts = [copied(part, f"{where}[{i}]", strict=strict) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if strict:
        raise TypeError(
            f"checkpoint: {where} is {type(value).__name__}, expected tensors, numbers and strings, which can be read "
            "back without running code; leave it out of state_dict(), or go without a checkpoint."
        )
    return copy.deepcopy(value)


def _mapping(value: Mapping[Any, Any], where: str, strict: bool) -> Mapping[Any, Any]:
    """A dictionary, or the kind of one that a scheduler or a model holds."""
    parts = {}
    for key, part in value.items():
        parts[key] = copied(part, f"{where}[{key!r}]", strict=strict)
    # a scheduler asks its milestones for .elements()
    if isinstance(value, Counter):
        return Counter(parts)
    if isinstance(value, OrderedDict):
        return OrderedDict(parts)
    return parts
