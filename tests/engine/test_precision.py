"""Lower precision, parameters that freeze, and those outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.engine.small import N, build
from tests.helpers.checks import (
    assert_rows,
    random_weights,
    truth_of,
)
from tests.helpers.truth import combine_truth, gram_truth, relative_error


def test_float32_rows_are_as_good_as_autograd() -> None:
    _, forward, params, engine = build("mlp_float32")
    losses = forward()
    J = truth_of(losses, params)
    rows = engine.rows(losses)
    assert rows.roles.dtype == torch.float32
    assert_rows(rows, J, params, 1e-6)


@pytest.mark.parametrize("cache", [True, False])
def test_bfloat16_autocast(cache: bool) -> None:
    """Rows of the autocast graph are what autograd makes of it, within bfloat16's rounding of its own sums."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(16, 32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Linear(32, 8),
        nn.Conv1d(5, 4, 3, padding=1),
    )
    x = torch.randn(6, 5, 16)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            return net(x).float().square().mean((1, 2))

    params, engine = list(net.parameters()), mtu.Engine(net)
    loss = forward()
    J = truth_of({"a": loss}, params)
    rows = engine.rows(loss)
    assert rows.roles.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert relative_error(rows.gram(), gram_truth(J)) <= 2 * eps
    w = random_weights(6)
    found, truth = rows.vjp(w), combine_truth(J, w)
    for j, p in enumerate(params):
        assert found[p].dtype == torch.float32
        assert relative_error(found[p], truth[j]) <= 4 * eps
    update = rows.backward(mtu.OrthoGrad())
    assert torch.isfinite(update.weights).all()


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.PCGrad(), mtu.GradDiff()])
def test_a_parameter_frozen_after_the_engine_was_made(method: mtu.Method) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    engine = mtu.Engine(net)
    net[0].weight.requires_grad_(False)
    engine.backward(
        net(torch.randn(N, 3, dtype=torch.float64)).square().sum(1),
        method,
        forget=torch.arange(N) == 1,
    )
    assert net[0].weight.grad is None
    assert all(p.grad is not None for p in (net[0].bias, net[2].weight, net[2].bias))


def test_weights_of_the_losses_for_parameters_outside() -> None:
    """Uneven weights inside, a mean outside: what each side gets is what autograd gives under its weights."""
    body, head = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
    net = nn.Sequential(body, nn.Tanh(), head)
    loss = net(torch.randn(N, 3, dtype=torch.float64)).square().flatten(1).sum(1)
    w, mean = torch.randn(N, dtype=torch.float64), torch.full((N,), 1 / N, dtype=torch.float64)
    inside = torch.autograd.grad(loss, list(body.parameters()), w, retain_graph=True)
    outside = torch.autograd.grad(loss, list(head.parameters()), mean, retain_graph=True)
    mtu.Engine(net, body.parameters()).rows(loss).backward(w, outside=mean)
    for p, g in zip(net.parameters(), (*inside, *outside), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)
