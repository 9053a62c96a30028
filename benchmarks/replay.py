"""The ops of a step alone: noted once, and run again without what was between them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    """Notes the ops that run in the context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        # what it gave is held, so that it is not freed before it is used again
        self.calls.append((func, args, kwargs, found))
        return found

    def again(self) -> None:
        """Run them again, on the same tensors: what is written in place, again and again."""
        with torch.no_grad():
            for func, args, kwargs, _ in self.calls:
                func(*args, **kwargs)
