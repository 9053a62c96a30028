"""Weights, scales, lengths and sizes of a batch that change from step to step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph import plans as plans_module
from tests.graph.steps import N, S, discoveries, double, steps
from tests.helpers.truth import relative_error


@pytest.mark.parametrize("weights", [(1.0, 0.25, 3.0, 0.0, -2.0), (1, 3, 2)], ids=["float", "int"])
def test_a_loss_weight_that_changes_every_step(
    weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats in the graph belong to no signature, and to no plan."""
    net, found = (
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double(),
        discoveries(monkeypatch),
    )

    def losses() -> Iterator[Tensor]:
        for weight in weights:
            h = torch.add(net(double(N, S, 3)), net(double(N, S, 3)), alpha=weight)
            yield weight * h.square().mean((1, 2)) + weight / 2 * h.abs().mean((1, 2))

    steps(net, losses())
    if isinstance(weights[0], float):
        assert len(found) == 1


def test_a_scale_that_changes_every_step_in_addmm() -> None:
    w, bias = nn.Parameter(double(3, 4)), nn.Parameter(double(4))
    model = nn.ParameterList([w, bias])
    scales = ((1.0, 1.0), (2.0, 0.5), (0.5, 3.0), (1, 2))
    steps(
        model,
        (torch.addmm(bias, double(N, 3), w, beta=b, alpha=a).square().sum(1) for b, a in scales),
    )


def test_lengths_that_change_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan a length; the oldest are forgotten, and found anew when their length comes back."""
    monkeypatch.setattr(plans_module, "KNOWN", 3)
    net, found = (
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double(),
        discoveries(monkeypatch),
    )
    lengths = [1, 2, 3, 1, 2, 3, 4, 5, 4, 5, 1, 5, 1]
    engine = steps(net, (net(double(N, s, 3)).square().mean((1, 2)) for s in lengths))
    assert len(found) == 6
    assert len(engine._own.plans._known) == 3


def test_a_batch_that_changes_its_size() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    steps(net, (net(double(n, 3)).square().mean(1) for n in (4, 1, 7, 4, 2, 40, 1)))


@pytest.mark.parametrize("n", [31, 32, 33, 65, 1100])
def test_more_rows_than_one_digit(n: int) -> None:
    """Numbers of one to three digits to the base of the discovery. Losses Σ tanh(W x): J in closed form."""
    net, x = nn.Linear(3, 5, bias=False).double(), double(n, 3)
    h = torch.tanh(net(x))
    rows = mtu.Engine(net).rows(h.sum(1))
    J = ((1 - h.detach().square())[:, :, None] * x[:, None]).flatten(1)
    assert relative_error(rows.gram(), J @ J.T) <= 1e-12
