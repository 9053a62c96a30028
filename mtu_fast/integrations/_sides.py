"""Mean losses of both sides, as loops log them."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast._rows.update import Update
from mtu_fast.methods import FORGET, RETAIN

KINDS = {"forget": FORGET, "retain": RETAIN}


class Sides:
    """Means over the rows of several updates: nothing waits for a GPU before they are asked for."""

    def __init__(self) -> None:
        self._tasks: tuple[str, ...] = ()
        self._parts: dict[tuple[str, str], Tensor] = {}  # (side, task) -> [their sum, their number]

    def add(self, update: Update) -> None:
        """The losses of an update's rows, which are the step's own: no forward is made for a log line."""
        roles = update.roles
        self._tasks = tuple(dict.fromkeys([*self._tasks, *roles.tasks]))
        for side, kind in KINDS.items():
            for index, task in enumerate(roles.tasks):
                chosen = (roles.kind == kind) & (roles.task == index)
                # a loss that is not finite is not made NaN x 0 by the other side's
                losses = torch.where(chosen, roles.loss, 0.0)
                part = torch.stack([losses.sum(), chosen.sum().to(losses.dtype)])
                before = self._parts.get((side, task))
                self._parts[side, task] = part if before is None else before + part

    def means(self) -> dict[str, float]:
        """{"forget_loss", "retain_loss": mean}, by task where there are several; without a side that has no rows."""
        found = {}
        for (side, task), part in self._parts.items():
            total, count = part.tolist()
            if count:
                name = f"{side}_loss" if len(self._tasks) == 1 else f"{task}_{side}_loss"
                found[name] = total / count
        return found


def sides(update: Update) -> dict[str, float]:
    """Those of one update."""
    of_one = Sides()
    of_one.add(update)
    return of_one.means()
