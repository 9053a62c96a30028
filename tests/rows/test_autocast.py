"""An open autocast region rounds a forward, and nothing of what is made of its rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.checks import clear, grad_vector, trained

METHODS = [mtu.OrthoGrad(0.5), mtu.PCGrad(), mtu.GradDiff(0.5)]
FORGET = torch.arange(6) < 2


def scene() -> tuple[nn.Module, Tensor, mtu.Engine]:
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))
    return model, torch.randn(6, 4, 7), mtu.Engine(model)


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float().square().mean((1, 2))


@pytest.mark.parametrize("method", METHODS)
def test_backward_within_is_backward_outside(method: mtu.Method) -> None:
    model, x, engine = scene()
    found = []
    for is_open in (False, True):
        clear(model.parameters())
        losses = losses_of(model, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_open):
            engine.backward(losses, method, forget=FORGET)
        found.append(grad_vector(trained(model)))
    assert torch.equal(*found)


def test_a_basis_within_is_one_outside() -> None:
    found = []
    for is_open in (False, True):
        torch.manual_seed(0)
        model, x, engine = scene()
        subspace = mtu.Subspace(6, basis=True, every=1)
        for _ in range(2):
            clear(model.parameters())
            losses = losses_of(model, x)
            with torch.autocast("cpu", torch.bfloat16, enabled=is_open):
                engine.backward(losses, mtu.InterferenceAware(), forget=FORGET, subspace=subspace)
        found.append(grad_vector(trained(model)))
    assert torch.equal(*found)


def test_rows_within_are_rows_outside() -> None:
    model, x, engine = scene()
    rows = engine.rows(losses_of(model, x))
    w = torch.randn(6, dtype=torch.float64)
    d = rows.vjp(w)
    outside = [rows.gram(), rows.jvp(d), *d.values(), *rows.jacobian().values()]
    with torch.autocast("cpu", torch.bfloat16):
        d = rows.vjp(w)
        within = [rows.gram(), rows.jvp(d), *d.values(), *rows.jacobian().values()]
    assert all(torch.equal(a, b) for a, b in zip(outside, within, strict=True))
