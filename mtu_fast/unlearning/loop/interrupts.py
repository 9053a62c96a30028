"""Signals that wait until something is complete: Ctrl-C, a loader's worker that died, the end of a job's time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]


def or_undone(function: Callable[[], T], undo: Callable[[], None]) -> T:
    """What `function` gives; where it raises anything, `undo` is run to its end before that goes on."""
    left = [undo]

    def last() -> None:
        while left:
            left[0]()
            left.pop()

    try:
        try:
            return function()
        except BaseException:
            uninterrupted(last)
            raise
    except BaseException:
        # a signal may come between that `except` and the moment from which signals wait: a loader that misses its
        # worker raises just before the signal of the worker's end
        uninterrupted(last)
        raise


def uninterrupted(function: Callable[[], None]) -> None:
    """Call a function; signals that come meanwhile take effect at its end."""
    # only the main thread gets signals
    is_main = threading.current_thread() is threading.main_thread()
    _without(_handled() if is_main else [], function)


def _handled() -> list[tuple[int, Handler]]:
    """Signals whose handlers are Python's, which may raise: torch does in that of a child's end, wherever we are."""
    found: list[tuple[int, Handler]] = []
    for number in sorted(signal.valid_signals()):
        handler = signal.getsignal(number)
        if callable(handler):
            found.append((number, handler))
    return found


def _without(handled: Sequence[tuple[int, Handler]], function: Callable[[], None]) -> None:
    if not handled:
        function()
        return
    (number, handler), *others = handled
    seen: list[FrameType | None] = []
    try:
        signal.signal(number, lambda _, frame: seen.append(frame))
        _without(others, function)
    finally:
        # a frame of its own for each signal: whatever another one raises, this handler comes back
        signal.signal(number, handler)
        for frame in seen:
            handler(number, frame)
