"""A run on disk: plain tensors and numbers, written in one go, refused where it is of another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mtu_fast._distributed.ranks import Ranks
from mtu_fast.unlearning.loop import sealed
from mtu_fast.unlearning.loop.contents import check_contents, check_pieces
from mtu_fast.unlearning.loop.copies import copied
from mtu_fast.unlearning.loop.pieces import Pieces

FORMAT = 8


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state; at every moment the file is the old one or the new one, and its pieces are there."""
    pieces = [name for name, _ in state.get("pieces", ())]
    sealed.check_seen(path, pieces)
    sealed.write(path, copied(state, "state") | {"format": FORMAT})
    # those of the old one, and of writers that were killed
    with suppress(OSError):
        sealed.remove_pieces(path, pieces)


def remove_unused(path: str | Path) -> None:
    """Remove pieces that the file does not name, after an error; where it cannot be read they stay."""
    with suppress(ValueError, OSError):
        state = sealed.read(path, mapped=True) if Path(path).exists() else {}
        sealed.remove_pieces(path, [name for name, _ in state.get("pieces", ())])


def load(
    path: str | Path,
    settings: Mapping[str, Any],
    needed: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """The state that was written under the same settings; no code of the file is run.

    Args:
        path: the file.
        settings: {name: value} as the state holds them under "settings".
        needed: parts that not every run has and this one needs.
        ranks: that all read it, each what it needs; None for one process, which reads all.

    Returns:
        The state, complete and of the right kinds.

    Raises:
        ValueError: the file is no checkpoint of `unlearn`, damaged, incomplete, or one of other
            settings.
    """
    state = sealed.read(path, mapped=ranks is not None)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint: {path} is no checkpoint of this version of mtu.unlearn; remove or rename it."
        )
    _check_settings(path, state.get("settings"), settings)
    if "pieces" in state:
        state = _with_pieces(path, state, ranks)
    check_contents(path, state, needed)
    return state


def _with_pieces(path: str | Path, state: Mapping[str, Any], ranks: Ranks | None) -> dict[str, Any]:
    """A state with what the first share of the data had of its own, and the pieces in the place of their names."""
    check_pieces(path, state)
    pieces = Pieces(path, state["pieces"], state["shares"])
    # each rank looks at some: together at all
    pieces.check(*((0, 1) if ranks is None else (ranks.rank, ranks.size)))
    return {**state, **pieces.own_of(0), "pieces": pieces}


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
