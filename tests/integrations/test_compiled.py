"""Modules run by `torch.compile`: found and said once, exact either way, and read op by op under `engine.eager()`."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch

import mtu_fast as mtu
from tests.helpers.checks import clear, grad_vector
from tests.helpers.truth import relative_error

FORGET = torch.arange(5) < 2
WARNING = "torch.compile"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def scene(backend: str) -> tuple[nn.Module, Any, torch.Tensor, torch.Tensor]:
    """A model, the same compiled, inputs, and what a step on the model gives."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    mtu.Engine(model).backward(model(x).square().mean(1), mtu.OrthoGrad(0.5), forget=FORGET)
    expected = grad_vector(list(model.parameters()))
    clear(model.parameters())
    return model, torch.compile(model, backend=backend), x, expected


def step(engine: mtu.Engine, module: Any, x: torch.Tensor, eager: bool) -> torch.Tensor:
    clear(module.parameters())
    if eager:
        with engine.eager():
            losses = module(x).square().mean(1)
    else:
        losses = module(x).square().mean(1)
    engine.backward(losses, mtu.OrthoGrad(0.5), forget=FORGET)
    return grad_vector(list(module.parameters()))


@pytest.mark.parametrize("given", ["model", "compiled"])
def test_it_is_exact_and_said_once(given: str) -> None:
    model, compiled, x, expected = scene("aot_eager")
    engine = mtu.Engine(model if given == "model" else compiled)
    with pytest.warns(UserWarning, match=WARNING) as said:
        found = [step(engine, compiled, x, eager=False) for _ in range(2)]
    assert len(said) == 1
    assert all(relative_error(each, expected) <= 1e-12 for each in found)
    assert any(line.slow for line in engine.explain().lines)


@pytest.mark.parametrize("compiled_before", [False, True])
def test_eager_reads_the_graph(compiled_before: bool) -> None:
    """Whether or not it was compiled before; and outside the context it is compiled again."""
    model, compiled, x, expected = scene("aot_eager")
    if compiled_before:
        compiled(x)
    engine = mtu.Engine(compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = step(engine, compiled, x, eager=True)
    assert relative_error(found, expected) <= 1e-15
    assert not any(line.slow for line in engine.explain().lines)
    assert "Compiled" in compiled(x).grad_fn.name()


def test_a_compiled_loss_and_a_frozen_encoder() -> None:
    """A frozen encoder may stay compiled: no gradient goes through it, so nothing is said."""
    model, _, x, _ = scene("aot_eager")
    encoder = nn.Linear(6, 6).double().requires_grad_(False)
    frozen: Any = torch.compile(encoder, backend="aot_eager")
    engine = mtu.Engine(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = step(engine, lambda_of(model, frozen), x, eager=False)
    expected = step(mtu.Engine(model), lambda_of(model, encoder), x, eager=False)
    assert relative_error(found, expected) <= 1e-12


def lambda_of(model: nn.Module, encoder: Any) -> Any:
    """The model on top of an encoder."""

    class On(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(encoder(x))

    return On()


def test_a_region_with_buffers_of_its_own() -> None:
    """The inner activations of two hidden layers, of which rows need a backward each."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    compiled: Any = torch.compile(model, backend="aot_eager")
    engine, x = mtu.Engine(model), torch.randn(5, 6)
    with pytest.warns(UserWarning, match=WARNING):
        found = step(engine, compiled, x, eager=False)
    expected = step(mtu.Engine(model), model, x, eager=False)
    assert relative_error(found, expected) <= 1e-6
    assert relative_error(step(engine, compiled, x, eager=True), expected) <= 1e-6


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_buffers_that_an_ordinary_backward_may_free(backend: str) -> None:
    """What was compiled for one backward refuses a second; compiled without that freedom, it has as many as needed."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    compiled: Any = torch.compile(model, backend=backend)
    engine, x = mtu.Engine(model), torch.randn(5, 6)
    expected = step(mtu.Engine(model), model, x, eager=False)
    compiled(x).sum().backward()
    with (
        pytest.warns(UserWarning, match=WARNING),
        pytest.raises(RuntimeError, match="donated_buffer"),
    ):
        step(engine, compiled, x, eager=False)
    assert all(p.grad is None for p in model.parameters())
    with functorch.patch(donated_buffer=False):
        torch._dynamo.reset()
        compiled(x).sum().backward()
        assert relative_error(step(engine, compiled, x, eager=False), expected) <= 1e-6


@pytest.mark.slow
def test_inductor() -> None:
    """The compiler that users have."""
    _, compiled, x, expected = scene("inductor")
    engine = mtu.Engine(compiled)
    with pytest.warns(UserWarning, match=WARNING):
        assert relative_error(step(engine, compiled, x, eager=False), expected) <= 1e-12
    assert relative_error(step(engine, compiled, x, eager=True), expected) <= 1e-15
