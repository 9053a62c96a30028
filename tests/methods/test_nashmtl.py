"""Nash-MTL: the equation, its closed form for two rows, and rows that cannot agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast.methods import FORGET, RETAIN, NashMTL
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of
from tests.helpers.truth import relative_error


def residual(G: Tensor, w: Tensor) -> float:
    return float((w * (G @ w) - 1.0).abs().max())


@pytest.mark.parametrize("R", [1, 2, 3, 8, 24])
@pytest.mark.parametrize(("cond", "allowed"), [(2.0, 1e-12), (3e1, 1e-10), (3e2, 1e-8)])
@pytest.mark.parametrize("decades", [0, 6])
def test_solves_its_equation(R: int, cond: float, allowed: float, decades: float) -> None:
    for seed in range(6):
        J = matrices.conditioned(R, 32, cond, seed)
        J = matrices.scaled(J - (seed % 2) * 0.9 * J.mean(0) * (R > 1), decades, seed)
        G = J @ J.t()
        w = NashMTL()(G, roles_of(R, 0))
        assert (w > 0).all() and residual(G, w) <= allowed


@pytest.mark.parametrize("cosine", [-0.999999, -0.7, 0.0, 0.5, 0.9999999, 1.0])
@pytest.mark.parametrize("length", [1e-4, 1.0, 30.0])
def test_two_rows_have_a_closed_form(cosine: float, length: float) -> None:
    g11, g12, g22 = 4.0, cosine * 2.0 * length, length**2
    first = (g11 + g12 * (g11 / g22) ** 0.5) ** -0.5
    w = NashMTL()(torch.tensor([[g11, g12], [g12, g22]], dtype=torch.float64), roles_of(2, 0))
    assert w.tolist() == pytest.approx([first, first * (g11 / g22) ** 0.5], rel=1e-9)


@pytest.mark.parametrize(
    ("G", "kinds", "expected"),
    [
        ([[4.0]], [RETAIN], [0.5]),
        ([[1.0, 0.0], [0.0, 4.0]], [RETAIN, FORGET], [1.0, -0.5]),
        ([[1.0, -0.75], [-0.75, 1.0]], [RETAIN, RETAIN], [2.0, 2.0]),
        ([[1.0, 0.75], [0.75, 1.0]], [RETAIN, FORGET], [2.0, -2.0]),
        ([[1.0, 1.0], [1.0, 1.0]], [RETAIN, RETAIN], [0.5**0.5, 0.5**0.5]),  # one direction
        ([[1.0, -2.0], [-2.0, 4.0]], [RETAIN, RETAIN], [0.0, 0.0]),  # opposite
        ([[1.0, 1.0], [1.0, 1.0]], [RETAIN, FORGET], [0.0, 0.0]),
        ([[0.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [0.0, 0.5]),
        ([[0.0, 0.0], [0.0, 0.0]], [RETAIN, FORGET], [0.0, 0.0]),
        ([[4.0, 2.0, 2.0], [2.0, 4.0, 2.0], [2.0, 2.0, 4.0]], [RETAIN] * 3, [8**-0.5] * 3),
    ],
)
def test_weights(G: list[list[float]], kinds: list[int], expected: list[float]) -> None:
    w = NashMTL()(torch.tensor(G, dtype=torch.float64), roles(kinds))
    assert w.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("R", [1, 4])
@pytest.mark.parametrize("factor", [1e-5, 1e5])
def test_the_direction_has_length_root_R(R: int, factor: float) -> None:
    J = factor * matrices.conditioned(R, 9, 10.0)
    assert float((J.t() @ NashMTL()(J @ J.t(), roles_of(R, 0))).norm()) == pytest.approx(
        R**0.5, rel=1e-12
    )


def test_dependent_rows_that_can_agree_do() -> None:
    """Rank 3 of 6 rows in a half space: the equation still has its one solution."""
    J = matrices.low_rank(6, 20, 3)
    J = J * (J @ J[0]).sign()[:, None]
    G = J @ J.t()
    assert residual(G, NashMTL()(G, roles_of(6, 0))) <= 1e-8


@pytest.mark.parametrize("lengths", [[1.0, 1.0, 1.0], [1e-4, 1.0, 1e3]])
def test_rows_that_cancel_cannot_agree(lengths: list[float]) -> None:
    """g_3 = -(g_1 + g_2): whatever helps two hurts the third; beside a fourth row that is apart."""
    g = matrices.orthonormal(3, 9, 0)
    J = (
        torch.stack([g[0], g[1], -(g[0] + g[1]), g[2]])
        * torch.tensor([*lengths, 1.0], dtype=torch.float64)[:, None]
    )
    assert NashMTL()(J @ J.t(), roles_of(4, 0)).tolist() == [0.0] * 4


@pytest.mark.parametrize(("dtype", "gap", "agree"), [
    (torch.float64, 1e-6, True), (torch.float64, 1e-8, False),
    (torch.float32, 1e-5, True), (torch.float32, 1e-7, False),
])  # fmt: skip
def test_how_near_to_opposite_counts_as_opposite(
    dtype: torch.dtype, gap: float, agree: bool
) -> None:
    J = torch.tensor([[1.0, 0.0], [-1.0, gap]], dtype=torch.float64)
    w = NashMTL()(J @ J.t(), roles_of(2, 0, dtype))
    assert bool((w > 0).all()) is agree and bool((w == 0).all()) is not agree


def test_one_matrix_without_agreement_leaves_the_rest_of_a_batch_alone() -> None:
    J = matrices.conditioned(2, 5, 3.0)
    G = torch.stack([J @ J.t(), torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)])
    w = NashMTL()(G, roles_of(2, 0))
    assert w[1].tolist() == [0.0, 0.0] and residual(G[0], w[0]) <= 1e-12


def test_what_is_not_a_number_stays_so() -> None:
    assert (
        NashMTL()(torch.full((2, 2), torch.nan, dtype=torch.float64), roles_of(2, 0)).isnan().all()
    )


def test_gains_are_shared_by_lengths_only() -> None:
    """<g_i, d> = 1 / w_i: the products w_i <g_i, d> are all one."""
    J = matrices.conditioned(5, 8, 20.0)
    w = NashMTL()(J @ J.t(), roles_of(5, 0))
    assert relative_error(w * (J @ (J.t() @ w)), torch.ones(5, dtype=torch.float64)) <= 1e-10
