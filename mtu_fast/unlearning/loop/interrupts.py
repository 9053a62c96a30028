"""Ctrl-C that waits until something is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end; elsewhere than in the main thread there is none."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    seen: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: seen.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if seen:
            handler(signal.SIGINT, seen[0])
