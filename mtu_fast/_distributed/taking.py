"""Rows and gradients of the losses of all ranks, with the same calls as those of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor

from mtu_fast._distributed.alike import check_alike, check_dense
from mtu_fast._distributed.joining import in_order_of, joined, own_rows
from mtu_fast._distributed.means import Role, sliced_means, summed_means, totals
from mtu_fast._distributed.ranks import Ranks, attempt
from mtu_fast._distributed.slices import Given, Slices
from mtu_fast._distributed.streaming import Stream
from mtu_fast._distributed.sums import summed
from mtu_fast._distributed.units import Units
from mtu_fast._rows.bare import no_gradients, no_rows
from mtu_fast._rows.batch import Batch, Labelled
from mtu_fast._rows.grad import Addition, addition, check_finite, not_finite
from mtu_fast._rows.space import Space
from mtu_fast._rows.task_rows import TaskRows, all_roles
from mtu_fast._rows.update import Update
from mtu_fast.methods import Method
from mtu_fast.methods._undo import undone

T = TypeVar("T")


class Own(Protocol):
    """What this rank does alone."""

    @property
    def space(self) -> Space: ...

    def take(
        self,
        batch: Batch,
        per: str,
        counts: Mapping[Role, int] | None = None,
        sink: Stream | None = None,
    ) -> list[TaskRows]: ...

    def weighted(
        self,
        batch: Batch,
        at: Mapping[str, Labelled],
        weights: Tensor,
        outside: Tensor,
        sink: Stream | None = None,
    ) -> dict[Tensor, Tensor]: ...

    def follow_all(self) -> None: ...


class JoinedTaking:
    """From the losses of every rank to this rank's part of all rows, or to gradients summed over ranks.

    What one rank finds wrong is kept until the next exchange, and then raised by all.

    Args:
        own: what this rank does alone.
        ranks: who takes part.
        units: where parameters are gathered while rows are taken.

    Attributes:
        ranks: who takes part.
        size: their number.
    """

    def __init__(self, own: Own, ranks: Ranks, units: Units | None = None) -> None:
        self.ranks = ranks
        self._units = units
        self._slices = ranks.slices if isinstance(ranks.slices, Slices) else None
        self.size = ranks.size
        self._own = own
        self._space = own.space
        self._is_alike = False

    def rows(self, batch: Callable[[], Batch], per: str) -> list[TaskRows]:
        """This rank's part of the rows of all ranks' batches."""
        self._check_alike()
        return self._means(batch) if per == "task" else self._samples(batch)

    def rows_for(self, batch: Callable[[], Batch], method: Method) -> list[TaskRows]:
        """The rows that a method is to be given; only all ranks' roles say what the parameters outside get."""
        return self.rows(batch, method.per)

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

        def own(sink: Stream | None) -> dict[Tensor, Tensor]:
            (ours,) = batches
            inside, others = (in_order_of(ours.losses, parts, w[rows]) for w in (weights, outside))
            gradients = self._own.weighted(ours, ours.labels(), inside, others, sink)
            check_finite(gradients.values())
            if sink is not None and sink.not_finite:
                raise not_finite()
            return gradients

        with undone(method):
            weights, outside = method(None, roles), method.outside(roles)
            made = self._addition(own)
        made.write()
        made.run_hooks()
        return Update(weights, roles, None)

    def _addition(self, own: Callable[[Stream | None], dict[Tensor, Tensor]]) -> Addition:
        """What gradients, summed over ranks, add to `.grad`."""
        parameters = [*self._space.shared.parameters, *self.ranks.outside()]
        slices, units, what = self._slices, self._units, "engine.backward"
        if slices is None or units is None:
            found = summed(self.ranks, what, lambda: own(None), parameters)
            # once more: finite parts may have a sum that is not
            check_finite(found.values())
            return addition(found)
        stream = Stream(units, slices, self.ranks, [None], what)

        def given() -> Given:
            left = units.during(lambda: own(stream), stream)
            return list(left), iter(left.items())

        found = slices.scattered(what, given, parameters, self.ranks)
        found |= stream.sums()[None]
        self.ranks.agreed(what, lambda: check_finite(found.values()))
        return slices.addition(found)

    def _during(self, function: Callable[[], T]) -> T:
        """What a function gives that runs a backward; parameters are gathered as it needs them."""
        return function() if self._units is None else self._units.during(function)

    def _samples(self, batch: Callable[[], Batch]) -> list[TaskRows]:
        def take() -> list[TaskRows]:
            found = self._own.take(self._followed(batch), "sample")
            check_dense(found, self._space.shared)
            return found

        return joined(self.ranks, attempt(lambda: self._during(take)), self._space)

    def _means(self, batch: Callable[[], Batch]) -> list[TaskRows]:
        """The mean rows of all ranks' batches together."""
        batches: list[Batch] = []

        def count() -> dict[Role, int]:
            batches.append(self._followed(batch))
            return batches[0].counts()

        counts = totals(self.ranks, attempt(count), self._space)
        # no rank has a labelled sample, and all of them know it
        if not counts:
            nothing = attempt(lambda: no_rows(batches[0], self._space.shared))
            return joined(self.ranks, nothing, self._space)

        def take(sink: Stream | None) -> list[TaskRows]:
            # divided by the counts of all ranks: the shares then add up to the mean
            return self._own.take(batches[0], "task", counts, sink)

        roles, slices, units = list(counts), self._slices, self._units
        if slices is None or units is None:
            taken = attempt(lambda: take(None))
            return summed_means(self.ranks, taken, counts, self._space)
        stream = Stream(units, slices, self.ranks, roles, "engine.rows: means")
        taken = attempt(lambda: units.during(lambda: take(stream), stream))
        return sliced_means(self.ranks, slices, taken, counts, self._space, stream)

    def _followed(self, batch: Callable[[], Batch]) -> Batch:
        """The batch, once the model was looked at."""
        self._own.follow_all()
        return batch()

    def _check_alike(self) -> None:
        """Before the first step, all ranks hold the same numbers; and none may leave alone."""
        self.ranks.check_step()
        if not self._is_alike and self._slices is None:
            check_alike(self.ranks, self._space.model.parameters())
            self._is_alike = True
