"""Several tasks or models, and what they share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from tests.graph.steps import N, double
from tests.helpers.checks import assert_rows, trained, truth_of


@pytest.mark.parametrize("per", ["sample", "task"])
def test_some_tasks_share_more_than_others(per: str) -> None:
    """Tasks that read different depths, with an odd one that reaches no shared parameter at all."""
    first, second, own = (
        nn.Linear(3, 6).double(),
        nn.Linear(6, 4).double(),
        nn.Linear(3, 2).double(),
    )
    model = nn.ModuleList([first, second])
    params, engine = trained(model), mtu.Engine(model)
    for _step in range(2):
        x = double(N, 3)
        h = torch.tanh(first(x))
        losses = {
            "shallow": h.sum(1),
            "none": own(x).square().sum(1),
            "deep": second(h).square().sum(1),
        }
        J = truth_of(losses, params)
        rows = engine.rows(losses, per=per)
        if per == "sample":
            assert_rows(rows, J, params, 1e-12)
        else:
            means = {
                j: torch.stack([part.mean(0) for part in stack.split(N)]) for j, stack in J.items()
            }
            assert_rows(rows, means, params, 1e-12)


def test_one_loss_for_two_tasks() -> None:
    net = nn.Linear(3, 4).double()
    loss = net(double(N, 3)).square().sum(1)
    losses = {"a": loss, "b": loss, "c": 2 * loss}
    J = truth_of(losses, trained(net))
    assert_rows(mtu.Engine(net).rows(losses), J, trained(net), 1e-12)


def test_losses_of_two_models() -> None:
    """The graph also reaches parameters of another model: they are left alone."""
    mine, other = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()
    losses = {"a": other(torch.tanh(mine(double(N, 3)))).square().sum(1)}
    J = truth_of(losses, trained(mine))
    engine = mtu.Engine(mine)
    rows = engine.rows(losses)
    assert_rows(rows, J, trained(mine), 1e-12)
    rows.backward(mtu.OrthoGrad())
    assert all(p.grad is None for p in other.parameters())


def test_tasks_that_change_places() -> None:
    """One graph, its two ends given in either order: which loss is which belongs to the signature."""
    net = nn.Linear(3, 1).double()
    net.register_parameter("w", nn.Parameter(double(())))
    engine, params = mtu.Engine(net), trained(net)
    for swapped in (False, True, False):
        one = torch.tanh(net(double(N, 3)).squeeze(1))
        two = one * net.w
        losses = {"a": two, "b": one} if swapped else {"a": one, "b": two}
        J = truth_of(losses, params)
        assert_rows(engine.rows(losses), J, params, 1e-12)
