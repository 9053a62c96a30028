"""A run as its checkpoint holds it, and the way back to that place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtu_fast._distributed.crew import Crew
from mtu_fast.engine import Engine
from mtu_fast.unlearning.loop import checkpoint
from mtu_fast.unlearning.loop.batches import Stream
from mtu_fast.unlearning.loop.crews import describe, joined, own
from mtu_fast.unlearning.loop.history import History
from mtu_fast.unlearning.loop.interrupts import held
from mtu_fast.unlearning.loop.settings import Settings
from mtu_fast.unlearning.loop.state import drawn_from, kept_parts, mark, put_back, take
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
        """All that a checkpoint holds."""
        kept = kept_parts(self._settings)
        state = self._crew.whole(take(self._settings, strict=True)) | {
            "settings": describe(self._crew, self._settings),
            "history": history.to_dict(),
            "step": step,
            "seconds": seconds,
            "random": capture(drawn_from(self._settings)),
        }
        for stream in self._streams:
            state[f"{stream.name}_place"] = stream.state_dict()
        for name, part in kept.items():
            state[name] = part.state_dict()
        return joined(self._crew, state, list(kept))

    def read(self, path: str | Path) -> dict[str, Any]:
        """This rank's part of the state in a file, "history" a `History`.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        kept = list(kept_parts(self._settings))
        needed = [name for name in ("scheduler", "method") if self._has_state(name)]
        described = describe(self._crew, self._settings)
        state = self._crew.first(
            "unlearn: checkpoint", lambda: checkpoint.load(path, described, needed + kept)
        )
        state = own(self._crew, state, kept)
        # each rank's slices of the whole that the first rank read
        state |= self._crew.cut(self._settings.model, self._settings.optimizer, state)
        state["history"] = _history(path, state["history"])
        return state

    def go_to(self, path: str | Path, state: dict[str, Any]) -> None:
        """Give all parts the state that was read; as they were where one of them does not take it.

        Raises:
            ValueError: a part does not take it.
        """
        # what a part refuses comes to light when others have their new state already
        before, drawn = mark(self._settings), capture(drawn_from(self._settings))
        try:
            self._put(path, state)
        except BaseException:
            with held():
                put_back(self._settings, before)
                restore(drawn, drawn_from(self._settings))
            raise

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
