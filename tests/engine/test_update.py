"""What an update does and reports, and the rank of what it projects on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast import reference
from tests.engine.small import MASK, build
from tests.helpers.checks import (
    truth_of,
)
from tests.helpers.models.base import Forward
from tests.helpers.truth import gram_truth, matrix, relative_error

# ---- what the update does ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "vit", "layer_norm"])
def test_the_direction_changes_no_retain_loss_to_first_order(name: str) -> None:
    """Central differences along d: forget losses rise along -d, retain losses stand still."""
    model, forward, params, engine = build(name, tasks=1, n=4)
    forget = torch.tensor([True, False, False, True])
    engine.backward(forward(), mtu.OrthoGrad(alpha=0.0), forget=forget)
    d = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in params]
    size = float(torch.stack([g.norm() for g in d]).norm())
    start = [p.detach().clone() for p in params]
    h = 1e-5 / size
    with torch.no_grad():
        ends = []
        for sign in (-1, 1):
            for p, p0, g in zip(params, start, d, strict=True):
                p.copy_(p0 + sign * h * g)
            ends.append(forward()["a"].clone())
    slope = (ends[1] - ends[0]) / (2 * h * size)
    J = matrix(truth_of({"a": _restored(params, start, forward)}, params))
    assert (slope[~forget].abs() <= 1e-7 * J[~forget].norm(dim=1)).all()
    assert float(slope[forget].mean()) < -1e-3 * float(J[forget].norm(dim=1).max())


def _restored(params: Sequence[Tensor], start: Sequence[Tensor], forward: Forward) -> Tensor:
    with torch.no_grad():
        for p, p0 in zip(params, start, strict=True):
            p.copy_(p0)
    return forward()["a"]


def test_update_reports_what_it_used() -> None:
    _, forward, params, engine = build()
    losses = forward()
    G = gram_truth(truth_of(losses, params))
    update = engine.backward(losses, mtu.OrthoGrad(), forget=MASK)
    assert update.gram is not None and relative_error(update.gram, G) <= 1e-12
    assert torch.equal(update.weights, mtu.OrthoGrad()(update.gram, update.roles))


# ---- rank ----------------------------------------------------------------------------------------


class Features(nn.Module):
    """Losses x @ w, so that J = x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@pytest.mark.parametrize(
    ("rows", "rank"),
    [
        (torch.eye(4, 7), 4),
        (torch.eye(4, 7)[[0, 1, 1, 2, 0]], 3),
        (torch.cat([torch.eye(3, 7), torch.zeros(2, 7)]), 3),
        (torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), 4),
        (torch.cat([torch.eye(3, 7), 1e-9 * torch.eye(5, 7)[3:]]), 5),
    ],
    ids=["independent", "duplicates", "zero rows", "more rows than parameters", "tiny rows"],
)
def test_rank_of_the_retain_rows(rows: Tensor, rank: int) -> None:
    rows = rows.double()
    model = Features(rows.shape[1])
    engine = mtu.Engine(model)
    g = torch.randn(1, rows.shape[1], dtype=torch.float64)
    forget = torch.arange(len(rows) + 1) == 2
    x = torch.cat([rows[:2], g, rows[2:]])
    update = engine.backward(model(x), mtu.OrthoGrad(alpha=0.0), forget=forget)
    assert update.rank is not None and int(update.rank) == rank
    d = reference.orthograd({"a": rows}, {"a": g}, alpha=0.0)
    assert float((model.w.grad - d).norm()) <= 1e-10 * float(g.norm())
    assert int(engine.rows(model(rows)).rank()) == rank
