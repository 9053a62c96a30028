"""Python's garbage collector, which is off while a step is under way."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import wraps
from threading import get_ident, main_thread
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

_is_off = False  # turned off by a call in the main thread


def uncollected(function: Function) -> Function:
    """The function without garbage collections while it runs in the main thread, if they were on.

    A step of many layers holds thousands of tuples and tensors until its end, and makes no cycles: a
    collection within it frees nothing of the step's, looks at all of them, and now and then at all
    that the process holds. The collector is the process's, and on again afterwards, whatever was
    asked of it meanwhile. In other threads it stays as it is, so that calls that overlap do not turn
    it on within one another.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        global _is_off
        # a nested call finds it off
        if not gc.isenabled() or get_ident() != main_thread().ident:
            return function(*args, **kwargs)
        try:
            _is_off = True
            gc.disable()
            return function(*args, **kwargs)
        finally:
            gc.enable()
            _is_off = False

    return cast(Function, wrapped)


def _turn_on() -> None:
    """In a process that was forked while a call was under way, which need not end there."""
    global _is_off
    if _is_off:
        _is_off = False
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turn_on)
