"""What a Lightning trainer says of the run that it makes, and how it wraps a module."""

from __future__ import annotations

import weakref
from typing import Any


class Around:
    """What an engine was made of; a copy of the module is another one, and forgets it."""

    def __init__(self, wrapped: Any = None) -> None:
        self._wrapped = None if wrapped is None else weakref.ref(wrapped)

    def __reduce__(self) -> tuple[type[Around], tuple[()]]:
        return Around, ()

    def holds(self, wrapped: Any) -> bool:
        """Whether it was made of this."""
        return self._wrapped is not None and self._wrapped() is wrapped


def is_fitting(trainer: Any) -> bool:
    """Whether a trainer begins to train, and does not only evaluate."""
    return getattr(getattr(trainer, "state", None), "fn", None) == "fit"


def batch_of(trainer: Any) -> int | None:
    """The number of the batch that is trained on, over all epochs."""
    return getattr(getattr(trainer, "fit_loop", None), "total_batch_idx", None)


def scaler_of(module: Any) -> Any:
    """The loss scaler of a module's trainer; None where there is none, or it is off."""
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def replicated(module: Any) -> Any:
    """What the trainer wraps the module in on several processes; else the module.

    Raises:
        RuntimeError: several processes that hold it in another way.
    """
    trainer = getattr(module, "_trainer", None)  # None before a trainer took the module
    if trainer is None or trainer.world_size == 1:
        return module
    from lightning.pytorch.strategies import DDPStrategy

    if not isinstance(trainer.strategy, DDPStrategy):
        found = type(trainer.strategy).__name__
        raise RuntimeError(
            f"lightning: found {trainer.world_size} processes by {found}, expected DDPStrategy (strategy='ddp'): "
            "others hold parameters and gradients in ways of their own."
        )
    return trainer.strategy.model
