"""Row maps: arrays of row numbers with a gradient's dimensions, and what views make of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtu_fast._graph.rowmap import (
    MEET,
    NO_ROW,
    Ids,
    RowMap,
    carried,
    compact,
    first,
    merged,
    reshaped,
)


def spread(ids: Ids, shape: tuple[int, ...]) -> Ids:
    return np.broadcast_to(ids, shape)


@st.composite
def two_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], Ids]:
    """Two shapes with as many elements, and a map of the first one, with or without gaps."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4, 5]), max_size=5))

    def shape(order: list[int]) -> tuple[int, ...]:
        sizes = []
        while order:
            take = draw(st.integers(1, len(order)))
            sizes.append(int(np.prod(order[:take])))
            order = order[take:]
        return tuple(sizes)

    out, into = shape(factors), shape(draw(st.permutations(factors)))
    known = [size if draw(st.booleans()) else 1 for size in out]
    low = draw(st.sampled_from([NO_ROW, 0]))
    numbers = draw(
        st.lists(st.integers(low, 3), min_size=int(np.prod(known)), max_size=int(np.prod(known)))
    )
    return out, into, np.array(numbers, dtype=np.int64).reshape(known)


@given(two_shapes())
def test_a_reshaped_map_says_the_same_of_every_element(
    case: tuple[tuple[int, ...], tuple[int, ...], Ids],
) -> None:
    out, into, ids = case
    found = reshaped(ids, out, into)
    assert np.array_equal(spread(found, into), spread(ids, out).reshape(into))
    assert all(size in {1, full} for size, full in zip(found.shape, into, strict=True))


def test_a_reshaped_map_stays_as_small_as_it_can() -> None:
    batch = first(4).reshape(4, 1, 1)
    flat = reshaped(batch, (4, 5, 8), (20, 8))
    assert flat.shape == (20, 1)
    assert reshaped(flat, (20, 8), (4, 5, 2, 4)).shape == (4, 1, 1, 1)


@given(st.lists(st.integers(NO_ROW, 3), min_size=6, max_size=6), st.booleans())
def test_a_compact_map_says_the_same(numbers: list[int], fill: bool) -> None:
    """Where gaps are filled, of every element that a row reaches."""
    ids = np.array(numbers).reshape(2, 3)
    said = spread(compact(ids, fill), ids.shape)
    assert np.array_equal(said if not fill else np.where(ids < 0, ids, said), ids)


def test_merged_maps_keep_rows_apart_or_say_that_they_meet() -> None:
    one, other = np.array([0, NO_ROW, 2]), np.array([NO_ROW, 1, 2])
    together = merged(one, other)
    assert together is not MEET and together.tolist() == [0, 1, 2]
    assert merged(one, np.array([1, 1, 2])) is MEET
    outer = merged(np.array([[0], [1]]), np.array([[0, NO_ROW], [NO_ROW, 1]]))
    assert outer is not MEET and outer.tolist() == [[0, 0], [1, 1]]


def test_dimensions_that_are_carried() -> None:
    ids = first(3).reshape(1, 3, 1)
    found = carried(ids, {1: 0}, (3, 7))
    assert found is not None and found.shape == (3, 1)
    assert carried(ids, {0: 0, 2: 1}, (2, 7)) is None
    both = carried(np.arange(6).reshape(2, 3), {0: 2, 1: 0}, (3, 1, 2))
    assert both is not None and np.array_equal(both[:, 0, :], np.arange(6).reshape(2, 3).T)


@pytest.mark.parametrize(
    ("ids", "inner"),
    [
        ([0, 0, 1, 1, 2, 2], 2),
        ([0, 1, 2, 0, 1, 2], 1),
        ([0, 0, 1, 1, 2, -1], 2),
        ([0, 1, 1, 0, 2, 2], 0),
        ([0, 1], 0),
    ],
    ids=["samples first", "samples last", "with a gap", "no order", "too few"],
)
def test_the_order_of_rows_along_a_dimension(ids: list[int], inner: int) -> None:
    assert RowMap(np.array(ids)[:, None], (len(ids), 4), 3).inner == inner


@pytest.mark.parametrize(
    "ids", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [0, 1, 1, 0, 2, -1], [1, 1, 1, 1, 1, 1]]
)
def test_positions_are_split_by_row(ids: list[int]) -> None:
    """Each row's positions in order, and zeros behind them."""
    rows, x = RowMap(np.array(ids)[None, :, None], (2, 6, 2), 3), torch.randn(2, 6, 2)
    found = rows.split(x, 1)
    for r in range(3):
        own = x.movedim(1, 0)[torch.tensor(ids) == r]
        assert torch.equal(found[r, : len(own)], own)
        assert not found[r, len(own) :].any()


def test_the_part_of_a_row_alone() -> None:
    ids, b = np.array([[0, 1], [1, NO_ROW]]), torch.randn(2, 2)
    parts = RowMap(ids, (2, 2), 2).only(b, torch.arange(2))
    assert torch.equal(
        parts, torch.stack([torch.where(torch.from_numpy(ids) == r, b, 0) for r in range(2)])
    )


def test_a_row_in_two_dimensions_has_no_single_one() -> None:
    rows = RowMap(np.array([[0, 1], [1, 0]]), (2, 2), 2)
    assert rows.dim is None
    with pytest.raises(ValueError, match="more than one dimension"):
        _ = rows.along
    assert RowMap(np.array([[1]]), (2, 3), 2).along.tolist() == [1, 1]
