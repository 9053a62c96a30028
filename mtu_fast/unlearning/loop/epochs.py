"""Which batches a step takes: the loader that leads, pass after pass, and the other one beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mtu_fast.unlearning.loop.batches import END, Stream
from mtu_fast.unlearning.loop.schedule import Scheduled
from mtu_fast.unlearning.loop.settings import Settings


class Epochs:
    """Pairs of a retain and a forget batch, up to the last epoch.

    The passes of one loader are the epochs: those of `retain`, or of `forget` where the schedule
    says so. The other loader begins anew whenever it ends.

    Args:
        settings: the run's.
        validation_loss: {task: mean loss on data never seen}, for schedules.

    Attributes:
        retain: where the retained data stand.
        forget: where the data to forget stand.
        schedule: the method, where it has one.
    """

    def __init__(self, settings: Settings, validation_loss: Callable[[], dict[str, float]]) -> None:
        self.forget = Stream("forget", settings.forget)
        self.retain = Stream("retain", settings.retain)
        method = settings.method
        self.schedule = method if isinstance(method, Scheduled) else None
        self._limit = settings.epochs
        self._validation_loss = validation_loss

    def batches(self) -> tuple[Any, Any] | None:
        """The next retain and forget batch; None after the last epoch."""
        if self.schedule is not None and self.schedule.epoch_of == "forget":
            # the leading side first: at the end nothing is drawn from the other
            forget = self._leading(self.forget)
            return None if forget is END else (self.retain.again(), forget)
        retain = self._leading(self.retain)
        return None if retain is END else (retain, self.forget.again())

    def _leading(self, leader: Stream) -> Any:
        """The next batch of the loader whose passes are the epochs; END after the last epoch."""
        if leader.open:
            batch = leader.advance()
            if batch is not END:
                return batch
        if leader.passes >= self._wanted():
            return END
        if self.schedule is not None:
            self.schedule.start_epoch(leader.passes, self._validation_loss)
        return leader.advance()

    def _wanted(self) -> float:
        wanted = [math.inf]
        if self._limit is not None:
            wanted.append(self._limit)
        if self.schedule is not None and self.schedule.epochs is not None:
            wanted.append(self.schedule.epochs)
        return min(wanted)
