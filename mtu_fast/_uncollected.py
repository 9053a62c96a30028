"""Python's garbage collector, which waits while a step is under way."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def uncollected(function: Function) -> Function:
    """The function without garbage collections while it runs; afterwards they are on if they were before.

    A step holds thousands of tuples and tensors until its end, and makes no cycles: a collection
    within it frees nothing, and looks at all of them, and now and then at all that the process holds.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        was_on = gc.isenabled()
        try:
            gc.disable()
            return function(*args, **kwargs)
        finally:
            if was_on:
                gc.enable()

    return cast(Function, wrapped)
