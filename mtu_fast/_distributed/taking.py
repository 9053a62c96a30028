"""Rows and gradients of the losses of all ranks, with the same calls as those of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from mtu_fast._distributed.alike import check_alike, check_dense
from mtu_fast._distributed.joining import in_order_of, joined, own_rows
from mtu_fast._distributed.means import Role, summed_means, totals
from mtu_fast._distributed.ranks import Ranks, attempt
from mtu_fast._distributed.sums import summed
from mtu_fast._rows.bare import no_gradients, no_rows
from mtu_fast._rows.batch import Batch, Labelled
from mtu_fast._rows.grad import accumulate, check_finite
from mtu_fast._rows.space import Space
from mtu_fast._rows.task_rows import TaskRows, all_roles
from mtu_fast._rows.update import Update
from mtu_fast.methods import Method


class Own(Protocol):
    """What this rank does alone."""

    @property
    def space(self) -> Space: ...

    def take(
        self, batch: Batch, per: str, counts: Mapping[Role, int] | None = None
    ) -> list[TaskRows]: ...

    def weighted(
        self, batch: Batch, at: Mapping[str, Labelled], weights: Tensor, outside: Tensor
    ) -> dict[Tensor, Tensor]: ...

    def follow_all(self) -> None: ...


class JoinedTaking:
    """From the losses of every rank to this rank's part of all rows, or to gradients summed over ranks.

    What one rank finds wrong is kept until the next exchange, and then raised by all.

    Args:
        own: what this rank does alone.
        ranks: who takes part.

    Attributes:
        ranks: who takes part.
        size: their number.
    """

    def __init__(self, own: Own, ranks: Ranks) -> None:
        self.ranks = ranks
        self.size = ranks.size
        self._own = own
        self._space = own.space
        self._is_alike = False

    def rows(self, batch: Callable[[], Batch], per: str) -> list[TaskRows]:
        """This rank's part of the rows of all ranks' batches."""
        self._check_alike()
        return self._means(batch) if per == "task" else self._samples(batch)

    def explicit(self, given: Callable[[], TaskRows]) -> list[TaskRows]:
        """This rank's part of rows that are given as vectors."""
        own = attempt(lambda: [given()])
        return joined(self.ranks, own, self._space, "engine.subspace_rows")

    def weighted_backward(self, batch: Callable[[], Batch], method: Method) -> Update:
        """A method that needs no Gram: one backward of this rank's losses under weights of all ranks' rows."""
        self._check_alike()
        batches: list[Batch] = []

        def look() -> list[TaskRows]:
            batches.append(self._followed(batch))
            return no_gradients(batches[0], self._space.shared)

        parts = joined(self.ranks, attempt(look), self._space)
        roles, rows = all_roles(parts), own_rows(parts, self.ranks)
        weights, outside = method(None, roles), method.outside(roles)

        def own() -> dict[Tensor, Tensor]:
            (ours,) = batches
            mine = [in_order_of(ours.losses, parts, w[rows]) for w in (weights, outside)]
            gradients = self._own.weighted(ours, ours.labels(), *mine)
            check_finite(gradients.values())
            return gradients

        parameters = [*self._space.shared.parameters, *self.ranks.outside()]
        found = summed(self.ranks, "engine.backward", own, parameters)
        check_finite(found.values())
        accumulate(found)
        return Update(weights, roles, None)

    def _samples(self, batch: Callable[[], Batch]) -> list[TaskRows]:
        def take() -> list[TaskRows]:
            found = self._own.take(self._followed(batch), "sample")
            check_dense(found, self._space.shared)
            return found

        return joined(self.ranks, attempt(take), self._space)

    def _means(self, batch: Callable[[], Batch]) -> list[TaskRows]:
        """The mean rows of all ranks' batches together."""
        batches: list[Batch] = []

        def count() -> dict[Role, int]:
            batches.append(self._followed(batch))
            return batches[0].counts()

        counts = totals(self.ranks, attempt(count), self._space)
        if not counts:
            nothing = attempt(lambda: no_rows(batches[0], self._space.shared))
            return joined(self.ranks, nothing, self._space)
        taken = attempt(lambda: self._own.take(batches[0], "task", counts))
        return summed_means(self.ranks, taken, list(counts), self._space)

    def _followed(self, batch: Callable[[], Batch]) -> Batch:
        """The batch, once the model was looked at."""
        self._own.follow_all()
        return batch()

    def _check_alike(self) -> None:
        """Before the first step, all ranks hold the same numbers."""
        if not self._is_alike:
            check_alike(self.ranks, self._space.model.parameters())
            self._is_alike = True
