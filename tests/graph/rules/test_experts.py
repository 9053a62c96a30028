"""Experts as one stack of weights: rows are outer products of the tokens that each expert was sent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph.rules import RULES
from tests.helpers.checks import assert_rows, joined, trained, truth_of

N, S, D, H, E = 4, 6, 8, 16, 5
ROUNDING = 4e-6  # of float32: there is no grouped product in float64

pytestmark = pytest.mark.usefixtures("one_thread")


class Experts(nn.Module):
    """Two layers of E experts; tokens choose by a frozen router among all but the last."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.up = nn.Parameter(torch.randn(E, H, D) if transposed else torch.randn(E, D, H))
        self.down = nn.Parameter(torch.randn(E, H, D))
        self.register_buffer("router", torch.randn(D, E - 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        expert, order = torch.sort((flat @ self.router).argmax(1))
        ends = torch.bincount(expert, minlength=E).cumsum(0).int()
        up = self.up.transpose(1, 2) if self.transposed else self.up
        hidden = torch._grouped_mm(flat[order], up, offs=ends).relu()
        out = torch._grouped_mm(hidden, self.down, offs=ends)
        return torch.zeros_like(flat).index_put((order,), out).view(x.shape)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("count", [1, N])
def test_grouped_products(transposed: bool, count: int) -> None:
    model = Experts(transposed)
    params, engine = trained(model), mtu.Engine(model)
    for _ in range(3):
        loss = model(torch.randn(count, S, D)).pow(2).mean((1, 2))
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, ROUNDING)
    for line in engine.explain().lines:
        assert line.sites == ("GroupedMmBackward0: rule",) and not line.slow


def test_without_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "GroupedMmBackward0")
    model = Experts(True)
    params, engine = trained(model), mtu.Engine(model)
    loss = model(torch.randn(N, S, D)).pow(2).mean((1, 2))
    J = truth_of({"a": loss}, params)
    assert_rows(engine.rows(loss), J, params, ROUNDING)
    assert all(line.slow for line in engine.explain().lines)


def test_large_experts_stay_factors() -> None:
    model = Experts(False)
    model.up, model.down = (
        nn.Parameter(torch.randn(E, D, 512)),
        nn.Parameter(torch.randn(E, 512, D)),
    )
    params, engine = trained(model), mtu.Engine(model)
    losses = {"a": model(torch.randn(N, S, D)).pow(2).mean((1, 2)) / 512}
    there = torch.tensor([True, True, False, True])
    losses["b"] = (
        model(torch.randn(N, S, D)).pow(2).mean((1, 2)) / 512 + 0.1 * model.up.square().sum()
    )
    J = joined(truth_of({"a": losses["a"]}, params), truth_of({"b": losses["b"][there]}, params))
    assert_rows(
        engine.rows(losses, present={"a": torch.ones(N, dtype=torch.bool), "b": there}),
        J,
        params,
        ROUNDING,
    )
    assert all(line.kept == "factors" and "blocks" in line.route for line in engine.explain().lines)


class OneByOne(nn.Module):
    """A stack of layers, of which each call uses some: all of them in turn, or those that tokens are sent to."""

    def __init__(self, routed: bool) -> None:
        super().__init__()
        self.routed = routed
        self.weight, self.bias = nn.Parameter(torch.randn(E, D, D)), nn.Parameter(torch.randn(E, D))
        self.register_buffer("router", torch.randn(D, E - 1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if not self.routed:
            for e in range(E):
                x = (
                    nn.functional.linear(x, self.weight[e], self.bias[e]).tanh()
                    @ self.weight[e - 1]
                )
            return x
        flat, found = x.reshape(-1, D), torch.zeros_like(x).view(-1, D)
        expert = (flat @ self.router).argmax(1)
        for e in expert.unique().tolist():
            (which,) = (expert == e).nonzero(as_tuple=True)
            found = found.index_add(
                0, which, nn.functional.linear(flat[which], self.weight[e], self.bias[e])
            )
        return found.view(x.shape)


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("tasks", [1, 2])
def test_blocks_of_a_stack_one_by_one(routed: bool, tasks: int) -> None:
    """Selected from one parameter, they meet as blocks of it, not as rows of all."""
    model = OneByOne(routed)
    params, engine = trained(model), mtu.Engine(model)
    for _ in range(3):
        losses = {
            str(k): model(torch.randn(N, S, D, dtype=torch.float64)).pow(2).mean((1, 2))
            for k in range(tasks)
        }
        J = truth_of(losses, params)
        assert_rows(engine.rows(losses), J, params, 1e-12)
    assert not any(line.slow for line in engine.explain().lines)


def test_stacks_of_large_layers_stay_factors() -> None:
    model = nn.ParameterDict({"w": torch.randn(E, 64, 64, dtype=torch.float64)})
    engine, x = mtu.Engine(model), torch.randn(N, 64, dtype=torch.float64)
    for e in range(E):
        x = (x @ model["w"][e].T).tanh()
    loss = x.pow(2).mean(1) + 0.1 * model["w"].square().sum()
    J = truth_of({"a": loss}, trained(model))
    assert_rows(engine.rows(loss), J, trained(model), 1e-12)
    (line,) = engine.explain().lines
    assert line.kept == "factors" and line.route == "blocks: outer, rank one + directions in common"
