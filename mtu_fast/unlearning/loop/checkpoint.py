"""A run on disk: plain tensors and numbers, written in one go, refused where it is of another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtu_fast.unlearning.loop import sealed
from mtu_fast.unlearning.loop.contents import check_contents
from mtu_fast.unlearning.loop.copies import copied

FORMAT = 4


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state; at every moment the file is the old one or the new one."""
    sealed.write(path, copied(state, "state") | {"format": FORMAT})


def load(
    path: str | Path, settings: Mapping[str, Any], needed: Sequence[str] = ()
) -> dict[str, Any]:
    """The state that was written under the same settings; no code of the file is run.

    Args:
        path: the file.
        settings: {name: value} as the state holds them under "settings".
        needed: parts that not every run has and this one needs.

    Returns:
        The state, complete and of the right kinds.

    Raises:
        ValueError: the file is no checkpoint of `unlearn`, damaged, incomplete, or one of other
            settings.
    """
    state = sealed.read(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint: {path} is no checkpoint of this version of mtu.unlearn; remove or rename it."
        )
    _check_settings(path, state.get("settings"), settings)
    check_contents(path, state, needed)
    return state


def _check_settings(path: str | Path, stored: Any, settings: Mapping[str, Any]) -> None:
    if not isinstance(stored, Mapping):
        raise ValueError(f"checkpoint: {path} is incomplete: it holds no settings.")
    for name in {**stored, **settings}:
        if stored.get(name) != settings.get(name):
            difference = _difference(stored.get(name), settings.get(name))
            raise ValueError(
                f"checkpoint: {path} is of a run with other settings: {name} {difference}. "
                "Give what it was begun with, or another path for a new run."
            )


def _difference(was: Any, now: Any) -> str:
    """What is not in both, of lists; else both."""
    if isinstance(was, list) and isinstance(now, list):
        only_was = [x for x in was if x not in now]
        only_now = [x for x in now if x not in was]
        return f"was {only_was}, is {only_now}"
    return f"was {was}, is {now}"
