"""Parameters that change after the engine was made are followed, or refused by name; never silently left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import mtu_fast as mtu
from tests.helpers.checks import assert_rows, clear, grad_vector, trained, truth_of

N = 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = (
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)),
            nn.Linear(4, 2),
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x)))
        return out


def losses(net: nn.Module) -> Tensor:
    out: Tensor = net(torch.randn(N, 3, dtype=torch.float64))
    return out.square().sum(1)


def replace_the_head(net: Net) -> None:
    net.head = nn.Linear(4, 3).double()


def freeze_then_unfreeze(net: Net) -> None:
    net.body[0].weight.requires_grad_(not net.body[0].weight.requires_grad)


def parametrize(net: Net) -> None:
    parametrizations.weight_norm(net.body[2])


def add_an_adapter(net: Net) -> None:
    net.body.append(nn.Linear(4, 4).double())


CHANGES: list[Callable[[Net], None]] = [
    replace_the_head,
    freeze_then_unfreeze,
    parametrize,
    add_an_adapter,
]


@pytest.mark.parametrize("change", CHANGES)
def test_an_engine_of_all_parameters_follows(change: Callable[[Net], None]) -> None:
    net = Net()
    if change is freeze_then_unfreeze:
        change(net)
    engine = mtu.Engine(net)
    for step in range(4):
        if step == 2:
            change(net)
        loss = losses(net)
        J = truth_of({"a": loss}, trained(net))
        assert_rows(engine.rows(loss), J, trained(net), 1e-10)


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(0.5), mtu.GradDiff()], ids=["OrthoGrad", "GradDiff"]
)
@pytest.mark.parametrize("change", [replace_the_head, add_an_adapter])
def test_what_is_new_and_not_known_to_be_shared_is_refused(
    change: Callable[[Net], None], method: mtu.Method
) -> None:
    net = Net()
    engine = mtu.Engine(net, params=net.body.parameters())
    engine.backward(losses(net), method, forget=torch.arange(N) < 2)
    clear(net.parameters())
    change(net)
    with pytest.raises(
        RuntimeError,
        match=r"found (head|body\.3)\.weight, .* did not have when the engine was made",
    ):
        engine.backward(losses(net), method, forget=torch.arange(N) < 2)
    assert all(p.grad is None for p in net.parameters())


def test_params_that_were_frozen_are_shared_once_they_are_not() -> None:
    net = Net()
    net.body[0].weight.requires_grad_(False)
    engine = mtu.Engine(net, params=net.body.parameters())
    engine.rows(losses(net))
    net.body[0].weight.requires_grad_(True)
    loss = losses(net)
    shared = list(net.body.parameters())
    J = truth_of({"a": loss}, shared)
    assert_rows(engine.rows(loss), J, shared, 1e-10)


def test_heads_that_are_unfrozen_stay_outside() -> None:
    net = Net()
    net.head.requires_grad_(False)
    engine = mtu.Engine(net, params=net.body.parameters())
    engine.rows(losses(net))
    net.head.requires_grad_(True)
    assert list(engine.rows(losses(net)).parameters) == [
        f"body.{name}" for name, _ in net.body.named_parameters()
    ]
    engine.backward(losses(net), mtu.OrthoGrad())
    assert net.head.weight.grad is not None


def test_what_is_to_be_done_with_a_gradient_is_done() -> None:
    """Hooks that torch calls once `.grad` is there, as an optimizer in the backward has."""

    def descend(p: Tensor) -> None:
        p.data.add_(p.grad, alpha=-0.1)

    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    for model in (net, plain):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(descend)
    torch.manual_seed(1)
    losses(plain).mean().backward()
    torch.manual_seed(1)
    mtu.Engine(net).backward(losses(net), mtu.Mean())
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        grad_vector(list(net.parameters())), grad_vector(list(plain.parameters()))
    )
