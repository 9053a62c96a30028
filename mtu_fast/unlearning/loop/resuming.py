"""A run as its checkpoint holds it, and the way back to that place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mtu_fast._distributed.crew import Crew
from mtu_fast.engine import Engine
from mtu_fast.unlearning.loaders import length_of
from mtu_fast.unlearning.loop import checkpoint
from mtu_fast.unlearning.loop.batches import Stream
from mtu_fast.unlearning.loop.copies import copied
from mtu_fast.unlearning.loop.crews import describe, joined, own, own_buffers, own_of
from mtu_fast.unlearning.loop.history import History
from mtu_fast.unlearning.loop.interrupts import or_undone
from mtu_fast.unlearning.loop.pieces import WHAT, fill, write_pieces
from mtu_fast.unlearning.loop.settings import Settings
from mtu_fast.unlearning.loop.state import cut_as, drawn_from, kept_parts, mark, put_back, take
from mtu_fast.unlearning.randomness import capture, restore


class Saved:
    """What a checkpoint holds of a run.

    Args:
        settings: what was asked for.
        engine: of the model.
        crew: the ranks of the engine.
        streams: where the data to forget and the retained data stand.
    """

    def __init__(self, settings: Settings, engine: Engine, crew: Crew, *streams: Stream) -> None:
        self._settings = settings
        self._engine = engine
        self._crew = crew
        self._streams = streams

    def state(self, history: History, step: int, seconds: float) -> dict[str, Any]:
        """All that a checkpoint holds of this rank."""
        state = take(self._settings, strict=True) | {
            "settings": describe(self._crew, self._settings),
            "history": history.to_dict(),
            "step": step,
            "seconds": seconds,
            "random": capture(drawn_from(self._settings)),
            "buffers": copied(own_buffers(self._crew, self._settings.model)),
        }
        for stream in self._streams:
            state[f"{stream.name}_place"] = stream.state_dict()
        for name, part in kept_parts(self._settings).items():
            state[name] = part.state_dict()
        return state

    def write(self, path: str | Path, state: dict[str, Any]) -> None:
        """Write the states of all ranks: to one file, and to a piece of each where they hold slices.

        Raises:
            OSError: it cannot be written; what was there before is as it was.
        """
        crew = self._crew
        try:
            whole = self._joined(path, state)
            crew.first(WHAT, lambda: checkpoint.save(path, whole))
        except Exception:
            if crew.sliced is not None and crew.is_first:
                checkpoint.remove_unused(path)
            raise

    def _joined(self, path: str | Path, state: dict[str, Any]) -> dict[str, Any]:
        """What the file is to hold, of all ranks; their pieces are written."""
        crew, kept = self._crew, list(kept_parts(self._settings))
        if crew.sliced is None:
            return joined(crew, state, kept)
        mine = own_of(state, kept)
        rest = {name: part for name, part in state.items() if name not in mine}
        return write_pieces(path, crew, crew.sliced, rest, mine, cut_as(self._settings))

    def read(self, path: str | Path) -> dict[str, Any]:
        """This rank's part of the state in a file, "history" a `History`.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        crew, kept = self._crew, list(kept_parts(self._settings))
        needed = [name for name in ("scheduler", "method") if self._has_state(name)]
        described = describe(crew, self._settings)
        load = partial(checkpoint.load, path, described, needed + kept, crew.sliced)
        # ranks with slices read what is theirs; else the first reads for all
        state = crew.first(WHAT, load) if crew.sliced is None else crew.agreed(WHAT, load)
        return crew.agreed(WHAT, lambda: self._own(path, state, kept))

    def _own(self, path: str | Path, state: Mapping[str, Any], kept: list[str]) -> dict[str, Any]:
        lengths = {f"{stream.name}_place": length_of(stream.loader) for stream in self._streams}
        found = own(self._crew, state, kept, lengths)
        fill(path, found, cut_as(self._settings), self._crew.sliced is not None)
        found["history"] = _history(path, found["history"])
        return found

    def go_to(self, path: str | Path, state: dict[str, Any]) -> None:
        """Give all parts the state that was read; as they were where one of them does not take it.

        Raises:
            ValueError: a part does not take it.
        """
        # what a part refuses comes to light when others have their new state already
        before, drawn = mark(self._settings), capture(drawn_from(self._settings))

        def undo() -> None:
            put_back(self._settings, before)
            restore(drawn, drawn_from(self._settings))

        or_undone(lambda: self._put(path, state), undo)

    def _put(self, path: str | Path, state: dict[str, Any]) -> None:
        try:
            put_back(self._settings, state)
            for name, part in kept_parts(self._settings).items():
                of_rows = [] if name == "levels" else [self._engine.subspace_rows]
                part.load_state_dict(state[name], *of_rows)
            for stream in self._streams:
                stream.restore(state[f"{stream.name}_place"])
            restore(state["random"], drawn_from(self._settings))
        except Exception as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"checkpoint: {path} does not fit this run, which is as it was: {said}"
            ) from error
        # to replay a pass draws again, so generators are put in place once more at the end
        for stream in self._streams:
            stream.load_state_dict(state[f"{stream.name}_place"])
        restore(state["random"], drawn_from(self._settings))

    def _has_state(self, name: str) -> bool:
        return hasattr(getattr(self._settings, name), "state_dict")


def _history(path: str | Path, stored: dict[str, Any]) -> History:
    try:
        return History.from_dict(stored)
    except TypeError as error:  # a record with other fields
        raise ValueError(f"checkpoint: {path} is damaged: its history has {error}") from error
