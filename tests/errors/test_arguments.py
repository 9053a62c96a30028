"""What `cat` and the engine are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from tests.errors.bench import Bench, N

pytestmark = pytest.mark.usefixtures("only_new_objects")


def test_cat_of_nothing() -> None:
    with pytest.raises(ValueError, match="found no rows"):
        mtu.cat()


def test_cat_of_something_else(bench: Bench) -> None:
    with pytest.raises(TypeError, match=r"found Tensor, expected Rows"):
        mtu.cat(bench.engine.rows(bench.losses()), torch.ones(3))
    with pytest.raises(TypeError, match=r"found list, expected Rows"):
        mtu.cat([bench.engine.rows(bench.losses())])


def test_cat_of_two_engines(bench: Bench) -> None:
    other = mtu.Engine(bench.model)
    with pytest.raises(ValueError, match="rows of different engines"):
        mtu.cat(bench.engine.rows(bench.losses()), other.rows(bench.losses()))


def test_an_engine_of_parameters() -> None:
    model: Any = list(nn.Linear(3, 4).parameters())
    with pytest.raises(TypeError, match=r"model: found list, expected a torch.nn.Module; `params`"):
        mtu.Engine(model)


def test_an_engine_without_parameters() -> None:
    frozen = nn.Linear(3, 4).requires_grad_(False)
    given: tuple[Any, ...] = (None, frozen.parameters(), [])
    for params in given:
        with pytest.raises(ValueError, match="no parameter that requires grad"):
            mtu.Engine(frozen, params=params)


def test_parameters_of_another_model() -> None:
    with pytest.raises(
        ValueError,
        match=r"shapes \[\(4, 3\), \(4,\)\] that are not parameters of the model.*backbone",
    ):
        mtu.Engine(nn.Linear(5, 6), params=nn.Linear(3, 4).parameters())


def test_reentrant_checkpointing_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    net, last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    model = nn.ModuleList([net, last])
    x = torch.randn(N, 3, dtype=torch.float64, requires_grad=True)
    loss = last(checkpoint(net, x, use_reentrant=True)).square().sum(1)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        mtu.Engine(model).rows(loss)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("budget", "error"),
    [(-5, ValueError), ("1G", TypeError), (1e9, TypeError), (True, TypeError), (None, TypeError)],
)
def test_a_memory_budget_that_is_none(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"memory_budget: found .*, expected"):
        mtu.Engine(nn.Linear(2, 2), memory_budget=budget)


@pytest.mark.parametrize("wrong", [nn.Linear(3, 4), list(nn.Linear(3, 4).named_parameters())])
def test_params_that_are_no_parameters(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"params: found (Linear|tuple), expected parameters; pass"):
        mtu.Engine(nn.Linear(3, 4), params=wrong)
