"""Parameters that a user chooses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def listed(params: Any) -> list[Any] | None:
    """What is given as `params`, one by one; None for all.

    Raises:
        TypeError: no collection.
    """
    if params is None:
        return None
    if isinstance(params, nn.Module | Tensor):
        return [params]  # an error says which of its parameters to pass
    if not isinstance(params, Iterable):
        found = type(params).__name__
        raise TypeError(
            f"params: found {found}, expected parameters; pass model.backbone.parameters()."
        )
    return list(params)
