"""Mean rows of several micro-batches as the mean rows of all their samples together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast._rows.uses import Dense, Use
from mtu_fast._rows.validity import check_open
from mtu_fast.methods import Roles

Key = tuple[str, int]  # (task, kind)


class Means:
    """`mean += (new − mean) · n_new / n` for each (task, kind): the memory of one micro-batch, whatever their number.

    Args:
        shared: the parameters the rows lie in.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._tasks: list[str] = []
        self._means: dict[Key, TaskRows] = {}

    def copy(self) -> Means:
        """One of its own, of the same rows."""
        made = Means(self._shared)
        made._tasks, made._means = list(self._tasks), dict(self._means)
        return made

    def add(self, part: TaskRows) -> None:
        """Take in a mean row.

        Raises:
            RuntimeError: parameters changed since the others were taken.
        """
        # a mean row is of one task and one kind
        (task,), (kind,) = part.roles.tasks, part.outside
        key = task, kind
        if task not in self._tasks:
            self._tasks.append(task)
        before = self._means.get(key)
        if before is None:
            self._means[key] = part
            return
        check_open([before, part], self._shared)
        self._means[key] = _mean(before, part, self._shared)

    def parts(self) -> list[TaskRows]:
        """The mean rows: tasks in order of appearance, kinds in order within each, as one large batch has them."""
        order = sorted(self._means, key=lambda key: (self._tasks.index(key[0]), key[1]))
        return [self._means[key] for key in order]


def _mean(before: TaskRows, new: TaskRows, shared: Shared) -> TaskRows:
    assert before.mean_of is not None and new.mean_of is not None
    total = before.mean_of + new.mean_of
    share = new.mean_of / total
    uses: dict[int, Use] = {}
    # the union: a micro-batch may leave an expert or a head out
    for j in before.uses.keys() | new.uses.keys():
        rows = _lerp(_rows(before, j), _rows(new, j), share)
        uses[j] = Dense(tuple(rows.shape[1:]), rows)
    outside = {}
    for kind in before.outside.keys() | new.outside.keys():
        outside[kind] = _lerped(before.outside.get(kind, {}), new.outside.get(kind, {}), share)
    flags = [*before.flags, *new.flags]
    roles = _with_loss(before.roles, new.roles, share)
    found = TaskRows.of(roles, uses, outside, shared, flags, total)
    if before.everywhere is None or new.everywhere is None:
        return found
    # other ranks know of the row by its roles alone
    roles = _with_loss(before.everywhere.roles, new.everywhere.roles, share)
    return replace(found, everywhere=replace(before.everywhere, roles=roles))


def _with_loss(before: Roles, new: Roles, share: Tensor) -> Roles:
    """The loss of a mean row is a mean of losses, by the same share."""
    return replace(before, loss=before.loss.lerp(new.loss, share))


def _rows(part: TaskRows, j: int) -> Tensor | None:
    return part.uses[j].grounded().rows if j in part.uses else None


def _lerped(
    before: dict[Tensor, Tensor], new: dict[Tensor, Tensor], share: Tensor
) -> dict[Tensor, Tensor]:
    parameters = {**before, **new}  # in one order on all ranks, unlike a set
    return {p: _lerp(before.get(p), new.get(p), share) for p in parameters}


def _lerp(before: Tensor | None, new: Tensor | None, share: Tensor) -> Tensor:
    """`before + share (new − before)`; a parameter that one of them does not reach has gradient zero there."""
    if before is not None and new is not None:
        return before + (new - before) * share  # lerp knows no sparse gradients
    if before is not None:
        return before * (1.0 - share)
    return torch.as_tensor(new) * share
