"""Who takes part in a run: one process, or ranks that agree on every number before they decide anything."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from mtu_fast._checks.warned import warn
from mtu_fast._distributed.ranks import Ranks

T = TypeVar("T")


class Crew:
    """One process.

    Attributes:
        rank: the number of its share of the data.
        size: how many shares there are.
        is_first: whether it speaks for all.
        is_ranked: whether the engine joins the rows of ranks, if only of one.
        sliced: the ranks that hold slices of the model; None where each holds it whole.
    """

    rank = 0
    size = 1
    is_first = True
    is_ranked = False
    sliced: Ranks | None = None

    def objects(self, what: str, mine: T) -> list[T]:
        """The values of all shares of the data, plain ones or tensors, in their order."""
        return [mine]

    def every(self, what: str, mine: T) -> list[T]:
        """The values of all ranks, of one share too."""
        return [mine]

    def agreed(self, what: str, function: Callable[[], T]) -> T:
        """What a function gives on this rank, if it raises on none."""
        return function()

    def first(self, what: str, function: Callable[[], T]) -> T:
        """What a function gives on the first rank, which alone calls it."""
        return function()


class RankedCrew(Crew):
    """Ranks.

    Args:
        ranks: who takes part.
    """

    is_ranked = True

    def __init__(self, ranks: Ranks) -> None:
        self.rank = ranks.rank
        self.size = ranks.size
        self.is_first = ranks.rank == 0
        self.sliced = None if ranks.slices is None else ranks
        self._ranks = ranks

    def objects(self, what: str, mine: T) -> list[T]:
        """The values of all shares of the data, plain ones or tensors, in their order."""
        return self.every(what, mine)

    def every(self, what: str, mine: T) -> list[T]:
        """The values of all ranks, of one share too."""
        return self._ranks.objects(what, mine)

    def agreed(self, what: str, function: Callable[[], T]) -> T:
        """What a function gives on this rank, if it raises on none.

        Raises:
            Exception: of the kind that it raised on a rank, which is named.
        """
        if self.sliced is not None:
            return self._ranks.agreed(what, partial(_told, what, self.rank, function))
        return self._ranks.agreed(what, function)

    def first(self, what: str, function: Callable[[], T]) -> T:
        """What a function gives on the first rank, which alone calls it.

        Raises:
            Exception: of the kind that it raised there.
        """
        # an error of the first rank reaches all before they wait for its value
        found = self._ranks.agreed(what, lambda: function() if self.is_first else None)
        first: T = self._ranks.objects(what, found)[0]
        return first


class SharedCrew(RankedCrew):
    """Ranks that share one batch (tensor parallel): to the data they are one process.

    Args:
        ranks: who takes part.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self.rank, self.size = 0, 1

    def objects(self, what: str, mine: T) -> list[T]:
        """The value of the first rank, by which all decide."""
        return super().objects(what, mine)[:1]


def crew_of(ranks: Ranks | None, batches_differ: bool) -> Crew:
    """The crew of an engine, whose ranks have a batch each, or one together."""
    if ranks is None:
        return Crew()
    return RankedCrew(ranks) if batches_differ else SharedCrew(ranks)


def _told(what: str, rank: int, function: Callable[[], T]) -> T:
    """What a function gives; its error is said before the ranks meet, at which this process may be ended.

    Others may be in an exchange of the model's own forward, which does not fit the one that tells them.
    """
    try:
        return function()
    except Exception as error:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "always"
            )  # as an error it would keep this rank from meeting the others
            warn(f"rank {rank}: {what}: {type(error).__name__}: {error}", RuntimeWarning)
        raise
