"""Products of rows in the precision of the rows, also where a user's autocast region is open."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


NOTHING = nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast; that of torch costs as much as several ops, and is entered where one is open only."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return NOTHING


def without_autocast(function: Function) -> Function:
    """The method of `Rows` as it is outside any autocast region, which would round what it multiplies."""

    @wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with no_autocast(self.roles.loss.device):
            return function(self, *args, **kwargs)

    return cast(Function, wrapped)
