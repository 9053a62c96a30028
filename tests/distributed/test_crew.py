"""What a rank says of an error of its own before it meets the others, who may be elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest

from mtu_fast._distributed.crew import RankedCrew
from mtu_fast._distributed.ranks import Ranks


class Meeting:
    """Ranks, of which this is one: what was warned of is looked at when they meet."""

    rank, size = 1, 2

    def __init__(self, slices: object, seen: list[Any]) -> None:
        self.slices, self._seen = slices, seen

    def agreed(self, what: str, function: Callable[[], object]) -> object:
        try:
            return function()
        except ZeroDivisionError as error:
            raise RuntimeError(f"met with {len(self._seen)} warnings") from error


def wrong() -> object:
    return 1 / 0


@pytest.mark.parametrize(("slices", "told"), [(object(), 1), (None, 0)])
def test_an_error_is_told_before_the_ranks_meet(slices: object, told: int) -> None:
    """Of a model in slices: its forward is full of exchanges, in which the others wait."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("error")  # which must not keep the rank from meeting the others
        crew = RankedCrew(cast(Ranks, Meeting(slices, seen)))
        assert crew.agreed("losses", lambda: 3) == 3
        with pytest.raises(RuntimeError, match=f"met with {told} warnings"):
            crew.agreed("losses", wrong)
    found = [str(each.message) for each in seen]
    assert found == ["rank 1: losses: ZeroDivisionError: division by zero"][:told]
