"""Rows of tensor parallel models: every rank sees the same batch, and has its slice of every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtu_fast._distributed.cut import cut, sliced
from mtu_fast._distributed.ranks import Ranks, attempt
from mtu_fast._distributed.slices import Slices
from mtu_fast._distributed.taking import Own
from mtu_fast._rows.bare import sample_roles
from mtu_fast._rows.batch import Batch
from mtu_fast._rows.grad import check_finite
from mtu_fast._rows.task_rows import TaskRows, join_roles
from mtu_fast._rows.update import Update
from mtu_fast.methods import Method
from mtu_fast.methods._undo import undone

WHAT = "engine.rows"
CLOSE = 1e-3  # of the losses of one batch on two ranks, relative: sums in another order


class SameTaking:
    """From the losses of one batch, which all ranks have, to each rank's slices of their rows.

    Args:
        own: what this rank does alone; collectives of the model's own graph run in it.
        ranks: who takes part.
        slices: how parameters are held.

    Attributes:
        ranks: who takes part.
        size: 1: a batch is that of one process.
    """

    size = 1

    def __init__(self, own: Own, ranks: Ranks, slices: Slices) -> None:
        self.ranks = ranks
        self._own = own
        self._slices = slices

    def rows(self, batch: Callable[[], Batch], per: str) -> list[TaskRows]:
        """This rank's slices of the rows."""
        ours = self._agreed(batch)
        parts = self.ranks.agreed(WHAT, lambda: self._own.take(ours, per))
        return [sliced(part, self.ranks) for part in parts]

    def rows_for(self, batch: Callable[[], Batch], method: Method) -> list[TaskRows]:
        """The rows that a method is to be given."""
        return self.rows(batch, method.per)

    def explicit(self, given: Callable[[], TaskRows]) -> list[TaskRows]:
        """This rank's slices of rows that are given as whole vectors, the same on all ranks."""
        part = self.ranks.agreed(WHAT, given)
        return [cut(part, self._own.space.shared, self._slices)]

    def weighted_backward(self, batch: Callable[[], Batch], method: Method) -> Update:
        """A method that needs no Gram: one backward, of which each rank has its slices."""
        ours = self._agreed(batch)
        at = ours.labels()
        roles = join_roles(sample_roles(ours, at))

        def own() -> dict[Tensor, Tensor]:
            gradients = self._own.weighted(ours, at, weights, outside)
            check_finite(gradients.values())
            return gradients

        with undone(method):
            weights, outside = method(None, roles), method.outside(roles)
            made = self._slices.addition(self.ranks.agreed("engine.backward", own))
        made.write()
        made.run_hooks()
        return Update(weights, roles, None)

    def _agreed(self, batch: Callable[[], Batch]) -> Batch:
        """The batch, which is the same on all ranks.

        Raises:
            ValueError: it is not.
        """

        def look() -> Batch:
            self._own.follow_all()
            return batch()

        found = attempt(look)
        sizes = [] if found.error else [len(loss) for loss in found.value.losses.values()]
        told = self.ranks.told(WHAT, found.error, [len(sizes), sum(sizes)])
        ours: Batch = found.value
        differs = any(each != told[0] for each in told)
        # losses of unlike lengths must not meet in a broadcast
        if not differs:
            mine = torch.cat([loss.detach().double().flatten() for loss in ours.losses.values()])
            first = self.ranks.first(WHAT, mine)
            apart = not torch.allclose(mine, first, rtol=CLOSE, atol=CLOSE, equal_nan=True)
            # one rank that is apart is enough, and all must know
            differs = any(flag for (flag,) in self.ranks.gathered(WHAT, [int(apart)]))
        if differs:
            raise ValueError(
                "losses: found other losses on some ranks of a tensor parallel model, expected the same batch on all "
                "of them: give them one sampler, without shuffling of their own."
            )
        return ours


class DTensorSlicer:
    """Of a gradient that is a DTensor this rank's slice, cut as its parameter is."""

    def __call__(self, g: Any, parameter: Any) -> Tensor:
        """The slice; a plain gradient as it is."""
        if not hasattr(g, "to_local"):
            plain: Tensor = g
            return plain
        # autograd may leave sums that are not added up, or cut along another dimension
        if g.placements != parameter.placements:
            g = g.redistribute(parameter.device_mesh, parameter.placements)
        own = g.to_local()
        # torch moves the numbers in the background: they are waited for before they are read
        found: Tensor = own.wait() if hasattr(own, "wait") else own
        return found
