"""Signals that wait until something is complete: Ctrl-C, and a loader's worker that died."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

# torch raises in the handler of a child's end, wherever the program is; Windows has no such signal
_NAMES = ("SIGINT", "SIGCHLD")
_HELD = [signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__]


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
    _without(_HELD if is_main else [], function)


def _without(numbers: Sequence[signal.Signals], function: Callable[[], None]) -> None:
    if not numbers:
        function()
        return
    number, *others = numbers
    handler = signal.getsignal(number)
    if not callable(handler):
        _without(others, function)
        return
    seen: list[FrameType | None] = []
    try:
        signal.signal(number, lambda _, frame: seen.append(frame))
        _without(others, function)
    finally:
        # a frame of its own for each signal: whatever another one raises, this handler comes back
        signal.signal(number, handler)
        for frame in seen:
            handler(number, frame)
