"""Parameters outside the shared ones: one ordinary backward of the losses under weights that need no Gram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import FORGET, RETAIN, Roles, mean_weights
from tests.helpers.truth import relative_error

TASKS = ("a", "b", "c")
N = 6
FORGOTTEN = torch.arange(N) % 3 == 0


class Net(nn.Module):
    """A trunk, a head for each task, and a scale that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(5, 3) for task in TASKS})
        self.scale = nn.Parameter(torch.ones(5))
        self.double()

    def losses(self, seed: int) -> dict[str, Tensor]:
        """{task: `[N]`} of data drawn by the seed."""
        drawn = torch.Generator().manual_seed(seed)
        x = torch.randn(N, 4, dtype=torch.float64, generator=drawn)
        hidden = self.trunk(x) * self.scale
        return {task: head(hidden).square().sum(1) for task, head in self.heads.items()}

    def outside(self) -> list[Tensor]:
        return [*self.heads.parameters(), self.scale]


@dataclass(frozen=True)
class Graded(Method):
    """OrthoGrad's weights; outside, each sample's loss counts by its place in the batch."""

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Those of OrthoGrad."""
        return mtu.OrthoGrad()(G, roles)

    def outside(self, roles: Roles) -> Tensor:
        """Weights that differ within each kind."""
        return 0.1 + roles.sample.double()


@dataclass(frozen=True)
class Misshapen(Graded):
    """Weights for the parameters outside that are too few."""

    def outside(self, roles: Roles) -> Tensor:
        """One weight too few."""
        return roles.loss.new_ones(len(roles) - 1)


def truth(net: Net, losses: dict[str, Tensor], weights: dict[str, Tensor]) -> list[Tensor]:
    total = torch.stack([(weights[task] * loss).sum() for task, loss in losses.items()]).sum()
    return list(torch.autograd.grad(total, net.outside(), retain_graph=True))


def descend(net: Net) -> None:
    """A step of gradient descent."""
    with torch.no_grad():
        for p in net.parameters():
            assert p.grad is not None
            p.sub_(0.05 * p.grad)
            p.grad = None


def backwards(net: Net, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each call of autograd that asks for parameters outside: how many of them."""
    outside = {id(p) for p in net.outside()}
    asked: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        found = sum(id(p) in outside for p in inputs)
        if found:
            asked.append(found)
        return grad(outputs, inputs, *args, **more)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return asked


def test_heads_get_the_weighted_gradient_of_all_losses() -> None:
    net, method = Net(), mtu.OrthoGrad(alpha=0.3)
    engine = mtu.Engine(net, net.trunk.parameters())
    for seed in range(4):
        losses = net.losses(seed)
        r, f = (mask.double() / mask.sum() for mask in (~FORGOTTEN, FORGOTTEN))
        # task b has nothing to forget
        weights = dict.fromkeys(TASKS, 0.3 * r - 0.7 * f) | {
            "b": torch.full((N,), 0.3 / N, dtype=torch.float64)
        }
        expected = truth(net, losses, weights)
        engine.backward(losses, method, forget={"a": FORGOTTEN, "c": FORGOTTEN})
        for p, g in zip(net.outside(), expected, strict=True):
            assert p.grad is not None
            assert relative_error(p.grad, g) <= 1e-12
        descend(net)


def test_samples_without_a_label_give_heads_nothing() -> None:
    net = Net()
    engine = mtu.Engine(net, net.trunk.parameters())
    for seed in range(3):
        torch.manual_seed(seed)
        present = {task: torch.rand(N) < 0.7 for task in TASKS}
        losses = net.losses(seed)
        weights = {}
        for task in TASKS:
            retain, forget = present[task] & ~FORGOTTEN, present[task] & FORGOTTEN
            r, f = (mask.double() / mask.sum().clamp(min=1) for mask in (retain, forget))
            weights[task] = 0.5 * r - 0.5 * f
        expected = truth(net, losses, weights)
        engine.backward(losses, mtu.OrthoGrad(), forget=FORGOTTEN, present=present)
        for p, g in zip(net.outside(), expected, strict=True):
            assert p.grad is not None
            assert relative_error(p.grad, g) <= 1e-12
        descend(net)


def test_one_backward_does_for_all_tasks_and_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    engine = mtu.Engine(net, net.trunk.parameters())
    asked = backwards(net, monkeypatch)
    for seed in range(4):
        asked.clear()
        engine.backward(net.losses(seed), mtu.OrthoGrad(), forget=FORGOTTEN)
        assert asked == [len(net.outside())]
        descend(net)


def test_weights_may_differ_within_a_kind() -> None:
    net, method = Net(), Graded()
    engine = mtu.Engine(net, net.trunk.parameters())
    for seed in range(3):
        losses = net.losses(seed)
        weights = dict.fromkeys(TASKS, 0.1 + torch.arange(N).double())
        expected = truth(net, losses, weights)
        engine.backward(losses, method, forget=FORGOTTEN)
        for p, g in zip(net.outside(), expected, strict=True):
            assert p.grad is not None
            assert relative_error(p.grad, g) <= 1e-12
        descend(net)


def test_rows_know_gradients_outside_by_kind_only() -> None:
    """Rows are taken before anyone says which method weighs them."""
    net = Net()
    engine = mtu.Engine(net, net.trunk.parameters())
    rows = engine.rows(net.losses(0), forget=FORGOTTEN)
    with pytest.raises(ValueError, match="weights differ between rows of one kind and task"):
        rows.backward(Graded())
    assert all(p.grad is None for p in net.parameters())
    r, f = (mean_weights(rows.roles, kind) for kind in (RETAIN, FORGET))
    rows.backward(r - f)
    found = [p.grad for p in net.outside()]
    net.zero_grad()
    engine.backward(net.losses(0), r - f, forget=FORGOTTEN)
    for p, g in zip(net.outside(), found, strict=True):
        assert p.grad is not None and g is not None
        assert relative_error(p.grad, g) <= 1e-12


def test_too_few_weights_outside_are_refused_before_anything_runs() -> None:
    net = Net()
    engine = mtu.Engine(net, net.trunk.parameters())
    losses = net.losses(0)
    with pytest.raises(ValueError, match=r"outside: found shape \(17,\), expected weights \[18\]"):
        engine.backward(losses, Misshapen(), forget=FORGOTTEN)
    assert all(p.grad is None for p in net.parameters())
    engine.backward(losses, Graded(), forget=FORGOTTEN)  # the graph is still there
