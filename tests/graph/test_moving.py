"""Data that move rows in another way at every step: exact at each, and checked as rarely as plans that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph import plans
from mtu_fast._graph.plan import Plan
from tests.helpers.checks import assert_rows, trained, truth_of

N, D, STEPS = 6, 4, 20
DUE = [0, 1, 2, 4, 8, 16]

pytestmark = pytest.mark.usefixtures("one_thread")

Step = Callable[[nn.Module, int, Tensor], Tensor]  # model, number of the step, input -> losses [N]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def model() -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(D, D) for _ in range(3)]).double()


def run(net: nn.Module, step: Step, checks: list[int], steps: int = STEPS) -> list[int]:
    """Every step is exact; which of them were checked."""
    engine, params = mtu.Engine(net), trained(net)
    checked = []
    for k in range(steps):
        before = len(checks)
        loss = step(net, k, double(N, D))
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-11)
        if len(checks) > before:
            checked.append(k)
    return checked


def shuffled(net: nn.Module, k: int, x: Tensor) -> Tensor:
    """A fresh permutation, in place again before the losses."""
    order = torch.randperm(N)
    return torch.tanh(net[1](torch.tanh(net[0](x))[order]))[order.argsort()].square().sum(1)


def handed_round(net: nn.Module, k: int, x: Tensor) -> Tensor:
    """Every loss is that of another sample."""
    return torch.tanh(net[1](torch.tanh(net[0](x)))).index_select(0, torch.randperm(N)).sum(1)


def experts(net: nn.Module, k: int, x: Tensor) -> Tensor:
    """Shapes differ from step to step: an expert for each of two parts of the tokens, never empty."""
    tokens = (torch.tanh(net[0](x))[:, None] * torch.linspace(1, 2, 5)[:, None]).flatten(0, 1)
    order, out = torch.randperm(len(tokens)), torch.zeros_like(tokens)
    for expert, at in zip((net[1], net[2]), (order[: k + 1], order[k + 1 :]), strict=True):
        out = out.index_add(0, at, torch.tanh(expert(tokens[at])))
    return out.view(N, -1).square().sum(1)


@pytest.mark.parametrize("step", [shuffled, handed_round], ids=lambda f: f.__name__)
def test_checks_are_spread(step: Step, checks: list[int]) -> None:
    assert set(run(model(), step, checks)) <= set(DUE)


def test_every_plan_for_new_sizes_is_checked(checks: list[int]) -> None:
    assert run(model(), experts, checks) == list(range(STEPS))


def met_sometimes(net: nn.Module, k: int, x: Tensor) -> Tensor:
    """An index without repeats for a while, with some now and then."""
    index = torch.arange(N) if k % 3 else torch.randint(0, N, (N,))
    return torch.tanh(net[1](torch.tanh(net[0](x))[index])).square().sum(1)


def gate_that_opens(net: nn.Module, k: int, x: Tensor) -> Tensor:
    """Another sample's share is exactly zero at first."""
    h = torch.tanh(net[0](x))
    share = torch.zeros(N, N, dtype=torch.float64) if k < 5 else 1e-3 * double(N, N)
    return net[1](h + (share + torch.eye(N)) @ h).square().sum(1)


def write_elsewhere(net: nn.Module, k: int, x: Tensor) -> Tensor:
    """In-place writes of which the place is no argument of the node."""
    h, out = torch.tanh(net[0](x)), torch.zeros(N, 3, D, dtype=torch.float64)
    for t in range(3):
        place = out[:, (t + k) % 3] if k % 4 else out.transpose(0, 1).reshape(3, N, D)[t]
        place.add_(h * (t + 1)) if k % 4 else out.select(1, t).copy_(h.flip(0) if k % 8 else h)
    return net[1](out).square().sum((1, 2))


def written_over(net: nn.Module, k: int, x: Tensor) -> Tensor:
    """Rows of some samples are replaced by those of others."""
    h, at = torch.tanh(net[0](x)) * 1, torch.randperm(N)[: N // 2]
    h[at] = torch.tanh(net[1](x))[torch.randperm(N)[: N // 2]]
    return net[2](h).square().sum(1)


class Mixes(torch.autograd.Function):
    """`x`, of which the adjoint adds up neighbours where a tensor says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(share)
        return x + share * x.roll(1, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return grads[0] + (share * grads[0]).roll(-1, 0), None


def function_of_data(net: nn.Module, k: int, x: Tensor) -> Tensor:
    share = torch.zeros(N, 1, dtype=torch.float64)
    if k >= 3:
        share[k % N] = 10.0 ** -(k % 7)
    return net[1](Mixes.apply(torch.tanh(net[0](x)), share)).square().sum(1)


def empty_now_and_then(net: nn.Module, k: int, x: Tensor) -> Tensor:
    """A branch for some of the samples, for none, for all."""
    h = torch.tanh(net[0](x))
    at = torch.randperm(N)[: (0, N, 2, 3)[k % 4]]
    return net[2](h.index_put((at,), torch.tanh(net[1](h[at])))).square().sum(1)


def distances(net: nn.Module, k: int, x: Tensor) -> Tensor:
    """vmap gives the adjoint of `cdist` wrong: of zeros at first, so that it does not show."""
    points = torch.cdist(net[1].weight, net[2].weight) * (k >= 2)
    return (torch.tanh(net[0](x)) @ points).square().sum(1)


ADVERSE = [
    met_sometimes,
    gate_that_opens,
    write_elsewhere,
    written_over,
    function_of_data,
    empty_now_and_then,
    distances,
]


@pytest.mark.parametrize("step", ADVERSE, ids=lambda f: f.__name__)
def test_what_data_decide_is_read_at_every_step(step: Step, checks: list[int]) -> None:
    checked = run(model(), step, checks)
    assert len(checked) < STEPS


def swapped(plan: Plan) -> Plan:
    """Two rows are taken for each other, at one node."""
    node = max(i for i, row_maps in plan.maps[0].items() if row_maps[0] is not None)
    row_map = plan.maps[0][node][0]
    assert row_map is not None
    ids = row_map.ids.copy()
    ids[row_map.ids == 0], ids[row_map.ids == 1] = 1, 0
    return replace(plan, maps=[{**plan.maps[0], node: (replace(row_map, ids=ids),)}])


@pytest.mark.parametrize("step", [shuffled, experts], ids=lambda f: f.__name__)
def test_after_one_fault_every_plan_is_checked(
    step: Step, checks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discovery with a fault in it: it is never trusted again for graphs of this structure."""
    plain = plans.discover
    monkeypatch.setattr(plans, "discover", lambda graph: swapped(plain(graph)))
    with pytest.warns(RuntimeWarning, match="one backward each"):
        checked = run(model(), step, checks, 10)
    # the plan that takes rows one by one is kept where shapes stay
    assert checked == (list(range(10)) if step is experts else [0, 1, 2, 4, 8])


def orders() -> Iterator[Tensor]:
    while True:
        yield torch.randperm(N)


def test_two_tasks_that_move_apart(checks: list[int]) -> None:
    """Each task looks up in an order of its own."""
    net = model()
    engine, params, order = mtu.Engine(net), trained(net), orders()
    for _step in range(10):
        h = torch.tanh(net[0](double(N, D)))
        losses = {
            "a": F.embedding(next(order), net[1](h)).square().sum(1),
            "b": net[2](h)[next(order)].sin().sum(1),
        }
        J = truth_of(losses, params)
        assert_rows(engine.rows(losses), J, params, 1e-11)
    assert len(checks) <= 5
