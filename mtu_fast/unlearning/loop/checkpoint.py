"""A run on disk: plain tensors and numbers, written in one go, refused where it is of another run."""

from __future__ import annotations

import copy
import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 3
PLAIN = (str, bytes, int, float, bool, torch.dtype, torch.device, type(None))


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
    if type(value) in PLAIN:
        return value
    if isinstance(value, Counter | OrderedDict):
        parts = [(k, copied(v, f"{where}[{k!r}]", strict=strict)) for k, v in value.items()]
        return Counter(dict(parts)) if isinstance(value, Counter) else OrderedDict(parts)
    if isinstance(value, Mapping):
        return {k: copied(v, f"{where}[{k!r}]", strict=strict) for k, v in value.items()}
    if isinstance(value, list | tuple):
        parts = [copied(v, f"{where}[{i}]", strict=strict) for i, v in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if strict:
        raise TypeError(
            f"checkpoint: {where} is {type(value).__name__}, expected tensors, numbers and strings, which can be read "
            "back without running code; leave it out of state_dict(), or go without a checkpoint."
        )
    return copy.deepcopy(value)


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state; at every moment the file is the old one or the new one."""
    target = Path(path)
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            torch.save(copied(state, "state") | {"format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state that was written under the same settings; no code of the file is run.

    Args:
        path: the file.
        settings: {name: value} as the state holds them under "settings".

    Raises:
        ValueError: the file is no checkpoint of `unlearn`, or one of other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"checkpoint: {path} is no checkpoint of mtu.unlearn, or it is damaged: {error}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint: {path} is no checkpoint of this version of mtu.unlearn; remove or rename it."
        )
    stored = state["settings"]
    for name in {**stored, **settings}:
        if stored.get(name) != settings.get(name):
            raise ValueError(
                f"checkpoint: {path} is of a run with other settings: {name} {_difference(stored, settings, name)}. "
                "Give what it was begun with, or another path for a new run."
            )
    return state


def _difference(stored: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    was, new = stored.get(name), now.get(name)
    if isinstance(was, list) and isinstance(new, list):
        was, new = [x for x in was if x not in new], [x for x in new if x not in was]
    return f"was {was}, is {new}"
