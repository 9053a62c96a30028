"""Whole steps of random models some of whose parameters are outside: these get autograd's weighted gradient."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.truth import jacobian
from tests.random_models.check import _move
from tests.random_models.generate import Model, model

MODELS, CHUNK, ALPHA = 75, 25, 0.3

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:rows. :RuntimeWarning"),
]


def halved(m: Model, seed: int) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters to work on and those outside, drawn by the seed."""
    drawn = torch.Generator().manual_seed(seed)
    halves: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for p in m.net.parameters():
        if p.requires_grad:
            halves[int(torch.rand((), generator=drawn) < 0.5)].append(p)
    return halves


def weighted(losses: dict[str, Tensor], forget: dict[str, Tensor]) -> Tensor:
    """The sum of all losses under OrthoGrad's weights before surgery, `[]`."""
    total = torch.zeros((), dtype=torch.float64)
    for task, loss in losses.items():
        for mask, share in ((forget[task], ALPHA - 1), (~forget[task], ALPHA)):
            total = total + share / max(int(mask.sum()), 1) * (mask * loss).sum().double()
    return total


def errors(m: Model, seed: int) -> Iterator[float]:
    """|.grad - gradient| over the size of all gradients outside, call after call; none where a call is refused."""
    inside, outside = halved(m, seed)
    if not inside or not outside or m.hooked is not None:
        return
    engine, drawn = mtu.Engine(m.net, inside), torch.Generator().manual_seed(seed)
    for k in range(m.calls):
        losses = m.step(k)
        forget = {t: torch.rand(len(loss), generator=drawn) < 0.4 for t, loss in losses.items()}
        total = weighted(losses, forget)
        if not total.requires_grad:
            return
        truth = torch.autograd.grad(total, outside, retain_graph=True, materialize_grads=True)
        J = jacobian(losses, [*inside, *outside])
        m.net.zero_grad()
        try:
            engine.backward(losses, mtu.OrthoGrad(ALPHA), forget=forget)
        except (RuntimeError, ValueError) as error:
            # hooks that are not linear; or a batch that reaches none of the half
            assert "hook" in str(error) or "none of the engine's parameters" in str(error)
            return
        size = float(torch.stack([g.norm() for g in truth]).norm())
        for p, g in zip(outside, truth, strict=True):
            found = torch.zeros_like(p) if p.grad is None else p.grad
            yield float((found - g).norm()) / max(size, 1e-12)
        if m.moves:
            _move([*inside, *outside], J)


@pytest.mark.parametrize("first", range(0, MODELS, CHUNK))
def test_parameters_outside_get_the_weighted_gradient(first: int) -> None:
    looked_at = 0
    for seed in range(first, first + CHUNK):
        m = model(seed)
        limit = 1e-4 if "float32" in m.features else 1e-9
        for error in errors(m, seed):
            looked_at += 1
            assert error <= limit, f"{m}\n{error:.1e}"
    assert looked_at > 2 * CHUNK
