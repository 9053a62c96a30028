"""The hooks of a method that changes during a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Scheduled(Protocol):
    """A method whose weights depend on how far a run has come; `unlearn` calls the hooks of a method that has them.

    epoch_of: "forget" or "retain", the loader whose passes are the epochs. epochs: how many the
    method wants, known after `prepare`; None for any number. Where it wants a number the held-out
    level does not stop the run.
    """

    epoch_of: str
    epochs: int | None

    def prepare(
        self, *, forget: int, retain: int, forget_batches: int, retain_batches: int
    ) -> None:
        """Once, before the first step: samples of each side, and batches of one pass over it."""
        ...

    def start_epoch(self, epoch: int, validation: Callable[[], Mapping[str, float]]) -> None:
        """Before every epoch, counted from 0; `validation()` measures {task: mean validation loss} when called."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """All that the hooks have set: tensors, numbers and strings."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        ...
