"""Python's garbage collector, which waits while a step is under way."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import wraps
from threading import current_thread, main_thread
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

_waits = False  # whether a call in the main thread has turned it off


def uncollected(function: Function) -> Function:
    """The function without garbage collections while it runs in the main thread, where they are on.

    A step of many layers holds thousands of tuples and tensors until its end, and makes no cycles that
    hold any: a collection within it frees nothing, and looks at all of them, and now and then at all
    that the process holds. The collector is the process's. Calls in several threads could leave it
    off for good, each taking it to have been off before: in other threads it stays as it is.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        global _waits
        # nested calls find it off
        if not gc.isenabled() or current_thread() is not main_thread():
            return function(*args, **kwargs)
        try:
            _waits = True
            gc.disable()
            return function(*args, **kwargs)
        finally:
            gc.enable()
            _waits = False

    return cast(Function, wrapped)


def _turn_on() -> None:
    """In a process that another thread forked while a call was under way: the call does not end there."""
    if _waits:
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turn_on)
