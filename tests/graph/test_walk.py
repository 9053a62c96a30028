"""Maps that an experiment found, of which a batch shows some places only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mtu_fast._graph.rowmap import NO_ROW, Ids
from mtu_fast._graph.walk import without_gaps


def seen(shape: Sequence[int], places: Sequence[tuple[int, ...]]) -> Ids:
    """The map in which row r reaches the r-th place."""
    ids = np.full(shape, NO_ROW)
    for row, place in enumerate(places):
        ids[place] = row
    return ids


@pytest.mark.parametrize(
    "positions", [(1, 0, 2, 2), (3, 1, 0, 2), (1, 2, 3, 0), (5, 1, 7, 2), (0, 2, 4, 6)]
)
@pytest.mark.parametrize("length", [4, 8])
def test_any_position_of_a_sample_is_its_own(positions: tuple[int, ...], length: int) -> None:
    """Also where no two samples are read at one position, so that a position would tell the sample as well."""
    positions = tuple(p % length for p in positions)
    rows = np.arange(4)
    first = seen((4, length, 1), [(r, p, 0) for r, p in enumerate(positions)])
    assert np.array_equal(without_gaps(first, 4), rows[:, None, None])
    second = seen((length, 4, 1), [(p, r, 0) for r, p in enumerate(positions)])
    assert np.array_equal(without_gaps(second, 4), rows[None, :, None])
    flat = seen((4 * length,), [(r * length + p,) for r, p in enumerate(positions)])
    assert np.array_equal(without_gaps(flat, 4), rows.repeat(length))


def test_of_few_samples_an_order_that_occurs() -> None:
    """Positions 2 and 3 of two texts, position by position: runs of two would fit as well."""
    assert np.array_equal(without_gaps(seen((8,), [(4,), (7,)]), 2), [0, 1] * 4)


def test_one_sample_has_all_places() -> None:
    assert np.array_equal(without_gaps(seen((1, 5), [(0, 3)]), 1), [[0]])
    assert np.array_equal(without_gaps(seen((5, 1), [(3, 0)]), 1), [[0]])


def test_what_lies_in_no_order_stays() -> None:
    """Another row may come to a gap, and is then found."""
    odd = seen((7,), [(1,), (3,), (6,)])
    assert np.array_equal(without_gaps(odd, 3), odd)
    one_missing = seen((3, 4), [(0, 1), (1, 1)])
    assert np.array_equal(without_gaps(one_missing, 3), one_missing)


def test_samples_that_were_shuffled() -> None:
    shuffled = seen((3, 4), [(2, 1), (0, 1), (1, 1)])
    assert np.array_equal(without_gaps(shuffled, 3), [[1], [2], [0]])
