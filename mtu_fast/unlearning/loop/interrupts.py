"""Signals that wait until something is complete: Ctrl-C, and a loader's worker that died."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# torch raises in the handler of a child's end, wherever the program is; Windows has no such signal
_NAMES = ("SIGINT", "SIGCHLD")
_HELD = [signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__]


@contextmanager
def held() -> Iterator[None]:
    """Signals inside take effect at the end; elsewhere than in the main thread there are none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in _HELD}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    seen: list[tuple[int, FrameType | None]] = []
    for number in handlers:
        signal.signal(number, lambda came, frame: seen.append((came, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for came, frame in seen:
            handlers[signal.Signals(came)](came, frame)
