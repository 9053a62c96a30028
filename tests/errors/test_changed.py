"""Buffers and gradients that somebody writes to before their rows are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.errors.bench import MASK, N
from tests.helpers.checks import assert_rows, grads, same_grads, trained, truth_of

pytestmark = pytest.mark.usefixtures("only_new_objects")


def gram_of(rows: mtu.Rows) -> Any:
    return rows.gram()


USES: dict[str, Callable[[mtu.Rows], Any]] = {
    "gram": gram_of,
    "combine": lambda rows: rows.vjp(torch.ones(len(rows))),
    "backward": lambda rows: rows.backward(mtu.OrthoGrad()),
    "cat": lambda rows: mtu.cat(rows),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_an_input_buffer_that_is_filled_again(kind: str, use: str) -> None:
    """Rows hold the input they were made from, not a copy."""
    layer: nn.Module = nn.Linear(40, 50) if kind == "linear" else nn.Embedding(9, 40)
    buffer = torch.randn(N, 40) if kind == "linear" else torch.arange(8).view(N, 2)
    engine, params = mtu.Engine(layer), trained(layer)
    rows = engine.rows(layer(buffer).square().flatten(1).sum(1))
    for p in params:
        p.grad = torch.randn_like(p)
    before = grads(params)
    buffer.copy_(buffer.flip(0))
    with pytest.raises(
        RuntimeError, match=r"activation or input .* changed in place.*fresh tensor per batch"
    ):
        USES[use](rows)
    assert same_grads(before, params)


def test_a_hook_that_changes_a_gradient() -> None:
    """What the hook makes of each row is not known; it is refused by name whenever it was set."""
    layer = nn.Linear(3, 1)
    engine = mtu.Engine(layer)
    for _step in range(2):
        engine.rows(layer(torch.randn(2, 3)).squeeze(1))
    handle = layer.weight.register_hook(lambda g: 0.5 * g)
    with pytest.raises(
        RuntimeError,
        match=r"weight has a hook on its gradient.*\.grad is untouched.*per='task' obeys",
    ):
        engine.rows(layer(torch.randn(2, 3)).squeeze(1))
    handle.remove()
    engine.rows(layer(torch.randn(2, 3)).squeeze(1))


class Doubled(torch.autograd.Function):
    """x, with a backward that may write to the gradient it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, writes: bool) -> Tensor:
        ctx.writes = writes
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (grads[0].mul_(2) if ctx.writes else grads[0]), None


class Shifted(nn.Module):
    """A layer whose output meets a shift; the gradient that both are given is one tensor."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(3, 5), nn.Parameter(torch.randn(5))
        self.hooked, self.writes = hooked, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.hooked:
            h.register_hook(lambda g: g.mul_(2) if self.writes else None)
        else:
            h = Doubled.apply(h, self.writes)
        return (h + self.shift).square().sum(1)


def test_a_backward_that_writes_to_the_gradient_it_is_given() -> None:
    """On a graph that is known already, so that no control pass sees it."""
    model = Shifted(hooked=False)
    engine, params = mtu.Engine(model), trained(model)
    for model.writes in (False, True):
        before = grads(params)
        loss = model(torch.randn(N, 3))
        if model.writes:
            with pytest.raises(
                RuntimeError, match=r"a gradient was written to .*return a new tensor"
            ):
                engine.backward(loss, mtu.OrthoGrad())
            assert same_grads(before, params)
        else:
            engine.backward(loss, mtu.OrthoGrad())


def test_a_hook_that_writes_to_the_gradient_it_is_given() -> None:
    """Each row is what a backward of its own gives, shift included."""
    model = Shifted(hooked=True).double()
    engine, params = mtu.Engine(model), trained(model)
    engine.rows(model(torch.randn(N, 3, dtype=torch.float64)))
    model.writes = True
    losses = {"a": model(torch.randn(N, 3, dtype=torch.float64))}
    truth = truth_of(losses, params)
    with pytest.warns(RuntimeWarning, match="a hook sees the gradient at AddmmBackward0"):
        assert_rows(engine.rows(losses), truth, params, 1e-12)


@pytest.mark.filterwarnings("ignore:rows. a hook sees:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:backward. .grad still holds:UserWarning")  # on purpose
@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.PCGrad(), mtu.GradDiff()])
def test_a_hook_that_halves_an_activation_gradient(method: mtu.Method) -> None:
    """Each row is halved, as autograd would; the pass that frees the graph has no gradient to give to the hook."""
    layer, x = nn.Linear(3, 5).double(), torch.randn(N, 3, dtype=torch.float64)
    forward = mtu.Engine(layer)
    for step in range(2):
        losses = {}
        for task in ("a", "b"):
            h = layer(x)
            h.register_hook(lambda g: g * 0.5)
            losses[task] = h.square().sum(1)
        truth = truth_of(losses, layer.parameters())
        if method.needs_gram and method.per == "sample":
            assert_rows(forward.rows(losses), truth, trained(layer), 1e-12, seed=step)
        else:
            forward.backward(losses, method, forget=MASK)


@pytest.mark.parametrize("per", ["sample", "task"])
def test_parameters_that_were_frozen_since(per: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    engine = mtu.Engine(model, params=model[0].parameters())
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of the engine's parameters \(0.weight, 0.bias"):
        engine.rows(model(torch.randn(N, 3)).square().sum(1), per=per)
    with pytest.raises(ValueError, match=r"none of the engine's parameters \(0.weight, 0.bias"):
        engine.backward(model(torch.randn(N, 3)).square().sum(1), mtu.GradDiff(), forget=MASK)
    assert all(p.grad is None for p in model.parameters())


def test_losses_that_are_written_to_after_their_rows_were_taken() -> None:
    model = nn.Linear(3, 2).double()
    loss = model(torch.randn(N, 3, dtype=torch.float64)).square().sum(1)
    rows, before = mtu.Engine(model).rows(loss), loss.detach().clone()
    loss.detach().zero_()
    assert torch.equal(rows.roles.loss, before)
