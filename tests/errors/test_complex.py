"""Complex parameters: refused by name, or right outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._rows.grad import check_finite
from tests.errors.bench import N
from tests.helpers.checks import assert_rows, trained, truth_of

pytestmark = pytest.mark.usefixtures("only_new_objects")


class Rotated(nn.Module):
    """A linear layer, each feature times a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5).double()
        self.turn = nn.Parameter(torch.randn(5, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) * self.turn).real.square().sum(1)


def test_complex_parameters_are_refused_by_name() -> None:
    model = Rotated()
    with pytest.raises(
        TypeError,
        match=r"params: turn is torch.complex128.*shape \(5, 2\).*view_as_complex\(turn\)",
    ):
        mtu.Engine(model)


def test_a_complex_parameter_outside_gets_its_gradient() -> None:
    model, x = Rotated(), torch.randn(N, 3, dtype=torch.float64)
    params = trained(model.inner)
    engine = mtu.Engine(model, params=params)
    losses = model(x)
    J = truth_of({"loss": losses}, params)
    rows = engine.rows(losses)
    assert_rows(rows, J, params, 1e-12)
    rows.backward(mtu.Mean())
    found = model.turn.grad
    model.turn.grad = None
    model(x).mean().backward()
    assert torch.allclose(found, model.turn.grad, rtol=1e-12)


def test_a_complex_update_whose_imaginary_part_is_not_finite() -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        check_finite([torch.complex(torch.zeros(2), torch.tensor([0.0, torch.nan]))])
