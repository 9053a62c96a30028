"""Experiments on single nodes: which rows reach which elements, exactly and at any scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtu_fast._graph.reach import Probes, reach, strays
from mtu_fast._graph.rowmap import MEET, NO_ROW, Ids, Meet
from mtu_fast._graph.trial import within

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Function(torch.autograd.Function):
    """`x`, with a backward of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.own = backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.own(grads[0]), None


def asked(
    backward: Callable[[Tensor], Tensor], ids: Ids, dtype: torch.dtype, shape: tuple[int, ...]
) -> Ids | Meet:
    """What an experiment finds for the input of a function with this backward."""
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    node = Function.apply(2 * x, backward).grad_fn
    return reach(node, [ids], [0], int(ids.max()) + 1)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 130])
def test_rows_that_stay_apart(n: int, dtype: torch.dtype) -> None:
    ids = np.arange(n)[:, None]
    same, turned = (asked(f, ids, dtype, (n, 3)) for f in (lambda g: 3 * g, lambda g: g.flip(0)))
    assert same is not MEET and same[:, 0].tolist() == list(range(n))
    assert turned is not MEET and turned[:, 0].tolist() == list(range(n))[::-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", [(0, 1), (0, 4), (3, 4), (2, 3)])
@pytest.mark.parametrize("share", [1.0, 2.0**-6, 2.0**-12])
def test_two_rows_that_meet_however_weakly(
    share: float, pair: tuple[int, int], dtype: torch.dtype
) -> None:
    """One sees a share of the other that no rounding of the sum would show."""

    def backward(g: Tensor) -> Tensor:
        mixed = g.clone()
        mixed[pair[0]] += share * g[pair[1]]
        return mixed

    assert asked(backward, np.arange(5)[:, None], dtype, (5, 3)) is MEET


def test_places_that_no_row_reaches() -> None:
    found = asked(
        lambda g: g * torch.tensor([1.0, 0, 1, 1])[:, None],
        np.arange(4)[:, None],
        torch.float32,
        (4, 2),
    )
    assert found is not MEET and found[:, 0].tolist() == [0, NO_ROW, 2, 3]


def test_what_is_not_finite_counts_as_met() -> None:
    assert asked(lambda g: g * torch.inf, np.arange(3)[:, None], torch.float32, (3, 2)) is MEET


def test_rows_come_only_to_places_of_their_own() -> None:
    then = np.array([0, 1, NO_ROW])
    assert within(np.array([0, NO_ROW, NO_ROW]), then)
    assert not within(np.array([0, 1, 1]), then)
    assert not within(np.array([1, 1, NO_ROW]), then)
    assert not within(MEET, then)
    assert within(np.array(NO_ROW), then)
    assert not within(np.array([0, 1, NO_ROW]), np.array(NO_ROW))


def moving(matrix: Tensor) -> Any:
    """A node whose adjoint is this matrix, from positions of the output to those of the input."""
    x = torch.randn(matrix.shape[0], 2, dtype=matrix.dtype, requires_grad=True)
    return Function.apply(2 * x, lambda g: matrix @ g).grad_fn


@pytest.mark.parametrize("n", [1, 2, 3, 6, 17])
def test_an_experiment_is_repeated_with_the_same_answer(n: int) -> None:
    """By fewer operations than finding the maps anew takes: whatever moves, meets, appears or vanishes."""
    generator = torch.Generator().manual_seed(n)
    ids, probes, kept = np.arange(n)[:, None], Probes(), 0
    for trial in range(200):
        moves = torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
        moves = moves * (torch.rand(n, 1, generator=generator) < 0.8)
        then = reach(moving(moves), [ids], [0], n, probes)[0]
        assert then is not MEET
        one, other = (int(torch.randint(n, (), generator=generator)) for _ in range(2))
        change = (0.0, 1.0, -1.0, 1e-200)[trial % 4]
        moves[one, other] += change
        if trial % 5 == 0:
            moves[one] = 0
        node = moving(moves)
        now = reach(node, [ids], [0], n, probes)[0]
        stays = not any(map(bool, strays(node, [ids], {0: then}, n, probes)))
        assert stays == within(now, then)
        kept += stays
    assert 0 < kept < 200 or n == 1


def test_a_map_without_dimensions() -> None:
    """One loss, a number: found, and found again."""
    x = torch.randn((), requires_grad=True)
    node, ids = Function.apply(2 * x, lambda g: 3 * g).grad_fn, np.array(0)
    found = reach(node, [ids], [0], 1)[0]
    assert found is not MEET and found.shape == () and found == 0
    assert not any(map(bool, strays(node, [ids], {0: found}, 1, Probes())))
