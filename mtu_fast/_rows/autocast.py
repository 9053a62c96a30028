"""Products of rows in the precision of the rows, also where a user's autocast region is open."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """The method of `Rows` as it is outside any autocast region, which would round what it multiplies."""

    @wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.roles.loss.device.type, enabled=False):
            return function(self, *args, **kwargs)

    return cast(Function, wrapped)
