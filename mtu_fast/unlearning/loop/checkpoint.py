"""A run on disk: plain tensors and numbers, written in one go, refused where it is of another run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mtu_fast.unlearning.loop.copies import copied

FORMAT = 3


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
