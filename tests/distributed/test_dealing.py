"""Who multiplies which parameter, and what that is thought to cost."""

from __future__ import annotations

import torch

from mtu_fast._distributed.gram import _rounds
from mtu_fast._rows.products import work
from mtu_fast._rows.uses import Dense, Outer


def test_parameters_are_dealt_out_by_work() -> None:
    """The one of most work, though of fewest bytes, has a rank of its own."""
    sizes, costs = [[9, 1, 7], [9, 1, 7]], [[2, 30, 3], [2, 30, 3]]
    assert _rounds(sizes, costs) == [[[1], [0, 2]]]
    # where all is alike, bytes and then the number say who comes first
    assert _rounds([[5, 8, 5, 8]] * 2, [[1] * 4] * 2) == [[[0, 1], [2, 3]]]


def test_what_one_rank_has_alone_stays_there() -> None:
    sizes, costs = [[4, 0, 4], [0, 6, 4]], [[100, 0, 1], [0, 100, 1]]
    assert _rounds(sizes, costs) == [[[0, 2], [1]]]
    assert _rounds(sizes, costs, large={2}) == [[[0], [1]]]


def test_work_grows_with_rows_and_with_what_they_are_made_of() -> None:
    def outer(rows: int, positions: int, wide: int) -> float:
        left, right = torch.ones(rows, positions, 32), torch.ones(rows, positions, wide)
        return work(Outer((32, wide), left, right))

    assert outer(4, 8, 64) > outer(2, 8, 64) > outer(2, 1, 64)
    assert outer(4, 8, 64) > outer(4, 8, 32)
    rows = Dense((5,), torch.ones(6, 5))
    assert work(rows) == 2 * 6 * 6 * 5
