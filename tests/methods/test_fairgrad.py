"""FairGrad: the equation for every exponent, and its neighbours."""

from __future__ import annotations

import pytest
import torch

from mtu_fast.methods import FORGET, RETAIN, FairGrad, NashMTL
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of
from tests.helpers.truth import relative_error

EXPONENTS = [0.2, 0.5, 1.0, 2.0, 5.0, 10.0]


@pytest.mark.parametrize("a", EXPONENTS)
@pytest.mark.parametrize("R", [1, 2, 3, 8])
@pytest.mark.parametrize(("cond", "allowed"), [(2.0, 1e-11), (3e1, 1e-8)])
def test_solves_its_equation(a: float, R: int, cond: float, allowed: float) -> None:
    for seed in range(6):
        J = matrices.conditioned(R, 32, cond, seed)
        J = J - (seed % 2) * 0.8 * J.mean(0) * (R > 1)
        G = J @ J.t()
        w = FairGrad(a)(G, roles_of(R, 0))
        assert (w > 0).all() and float(((G @ w) * w ** (1 / a) - 1).abs().max()) <= allowed


@pytest.mark.parametrize("a", [0.5, 2.0, 5.0])
def test_rows_of_unequal_lengths(a: float) -> None:
    J = matrices.scaled(matrices.conditioned(5, 32, 5.0), 2)
    G = J @ J.t()
    w = FairGrad(a)(G, roles_of(5, 0))
    assert float(((G @ w) * w ** (1 / a) - 1).abs().max()) <= 1e-8


@pytest.mark.parametrize("a", EXPONENTS)
def test_rows_that_do_not_meet(a: float) -> None:
    """G = diag: g w = w^(-1/a), w = g^(-a/(1+a))."""
    g = torch.tensor([1.0, 16.0, 0.25, 1e-4], dtype=torch.float64)
    assert relative_error(FairGrad(a)(g.diag(), roles_of(4, 0)), g ** (-a / (1 + a))) <= 1e-11


@pytest.mark.parametrize("a", EXPONENTS)
def test_two_rows_alike_have_a_closed_form(a: float) -> None:
    """(1 + c) w = w^(-1/a)."""
    w = FairGrad(a)(torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64), roles_of(2, 0))
    assert w.tolist() == pytest.approx([2.0 ** (a / (1 + a))] * 2, rel=1e-12)


def test_exponent_one_is_nash() -> None:
    J = matrices.conditioned(5, 9, 30.0)
    G, who = J @ J.t(), roles([RETAIN, FORGET, RETAIN, FORGET, RETAIN])
    assert torch.equal(FairGrad(1.0)(G, who), NashMTL()(G, who))


def test_a_larger_exponent_lifts_the_row_that_gains_least() -> None:
    J = torch.tensor([[1.0, 0.2], [0.1, 0.3]], dtype=torch.float64)
    gains = []
    for a in EXPONENTS:
        d = J.t() @ FairGrad(a)(J @ J.t(), roles_of(2, 0))
        gains.append(float((J @ d).min() / d.norm()))
    assert gains == sorted(gains)


@pytest.mark.parametrize("a", EXPONENTS)
def test_rows_that_cannot_agree_have_no_weights(a: float) -> None:
    g = matrices.orthonormal(2, 5, 0)
    for J in (torch.stack([g[0], -3.0 * g[0]]), torch.stack([g[0], 2 * g[1], -g[0] - g[1]])):
        assert not FairGrad(a)(J @ J.t(), roles_of(len(J), 0)).any()


@pytest.mark.parametrize(("a", "error", "text"), [
    (0.0, ValueError, r"a: found 0.0, expected a number from 0.2 to 10; a = 0 is mtu.Sum\(\)"),
    (50.0, ValueError, "a: found 50.0"), (float("nan"), ValueError, "a: found nan"), ("2", TypeError, "a: found '2'"),
    (True, TypeError, "a: found True"),
])  # fmt: skip
def test_refuses_other_exponents(a: float, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FairGrad(a)
