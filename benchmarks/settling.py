"""Runs that settle: at the level they go on at a rate that falls to zero, and end with the best of their models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mtu_fast.unlearning.loop.settling import falling

# (model, its forget scores) to what is to be small
Judge = Callable[[nn.Module, Mapping[str, float]], float]
Rate = Callable[[int, int, int], float]  # (s, c, S) to what a learning rate is multiplied by


class Settling:
    """lr · (S − s) / (S − c) in step s of S, c the first evaluation at the level; the best one at the level counts.

    This is `settle=` of `mtu.unlearn` with S as K and as `max_steps`, but for the level: here it is
    one of the mean over tasks, as for every run of the protocol.

    Args:
        judge: what is least at the best evaluation: `protocol.HeldOut`.
        steps: S.
        rule: another rate than (S − s) / (S − c).

    Attributes:
        begun: c; None before it.
    """

    def __init__(self, judge: Judge, steps: int, rule: Rate = falling) -> None:
        self.begun: int | None = None
        self._judge, self._steps, self._rule = judge, steps, rule
        self._least = float("inf")
        self._best: tuple[int, dict[str, Tensor]] = (0, {})

    def look(self, step: int, model: nn.Module, history: Sequence[Mapping[str, Any]]) -> None:
        """Keep the model of this evaluation, the last one of the history, where it is better than those before."""
        self.begun = step if self.begun is None else self.begun
        found = self._judge(model, history[-1]["forget"])
        if found < self._least:
            self._least = found
            self._best = len(history), copy.deepcopy(model.state_dict())

    def rate(self, step: int) -> float:
        """What a step's learning rate is multiplied by."""
        return 1.0 if self.begun is None else self._rule(step, self.begun, self._steps)

    def put_back(self, model: nn.Module, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give the model the state of the best evaluation; the history up to it."""
        length, state = self._best
        model.load_state_dict(state)
        return history[:length]
