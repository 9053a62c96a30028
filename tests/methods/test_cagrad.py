"""CAGrad in Gram space against bisection over the worst row's gain, and against its dual."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, CAGrad, DualProj
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of

pytestmark = pytest.mark.usefixtures("one_thread")

RADII = [0.1, 0.5, 1.5]


def direction(J: Tensor, c: float) -> Tensor:
    return J.t() @ CAGrad(c)(J @ J.t(), roles_of(len(J), 0))


@pytest.mark.parametrize(("R", "P"), [(1, 3), (2, 3), (3, 3), (4, 8)])
@pytest.mark.parametrize("c", RADII)
@pytest.mark.parametrize("share", [0.0, 0.8])
def test_is_the_best_worst_gain_in_the_ball(R: int, P: int, c: float, share: float) -> None:
    J = matrices.pulled_apart(R, P, share, seed=R)
    assert (direction(J, c) - reference.cagrad(J, c)).norm() <= 1e-10 * J.norm()


def closed_form(J: Tensor, c: float) -> Tensor:
    """Two rows: the best of the ball's points towards either, and of those where both gain the same."""
    mean, (first, second) = J.mean(0), J
    radius = c * mean.norm()
    across = (first - second) / (first - second).norm()
    along = first - (first @ across) * across
    rest = (radius**2 - (mean @ across) ** 2).clamp(min=0.0).sqrt()
    even = mean - (mean @ across) * across + rest * along / along.norm()
    points = [mean + radius * g / g.norm() for g in J]
    if (even - mean).norm() <= radius * (1 + 1e-12):
        points.append(even)
    return max(points, key=lambda d: float((J @ d).min()))


@pytest.mark.parametrize("c", RADII)
@pytest.mark.parametrize("seed", range(6))
def test_two_rows(c: float, seed: int) -> None:
    J = matrices.pulled_apart(2, 5, 0.7, seed)
    assert (direction(J, c) - closed_form(J, c)).norm() <= 1e-11 * J.norm()


@pytest.mark.parametrize("R", [2, 6, 16, 32])
@pytest.mark.parametrize("c", RADII)
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_optimality(R: int, c: float, share: float) -> None:
    """In the ball, and the worst gain is the dual's least value: pᵀG 1/T + c ‖g_0‖ √(pᵀG p) for weights p ~ w - 1/T."""
    J = matrices.scaled(matrices.pulled_apart(R, 40, share), 1)
    w = CAGrad(c)(J @ J.t(), roles_of(R, 0))
    mean, d = J.mean(0), J.t() @ w
    radius = c * mean.norm()
    assert (d - mean).norm() <= radius * (1 + 1e-12)
    p = w - 1.0 / R
    assert (p >= 0).all()
    bound = (J.t() @ p) @ mean + radius * (J.t() @ p).norm()  # p's sum times the dual's value
    assert (bound - p.sum() * (J @ d).min()).abs() <= 1e-10 * p.sum() * J.norm(
        dim=1
    ).max() * mean.norm()


@pytest.mark.parametrize(
    ("G", "kinds", "c", "expected"),
    [
        # even rows: the mean, longer
        ([[1.0, 0.0], [0.0, 1.0]], [RETAIN, RETAIN], 0.5, [0.75, 0.75]),
        ([[1.0, 0.0], [0.0, 1.0]], [RETAIN, FORGET], 0.5, [0.75, -0.75]),
        # all for the short row
        ([[1.0, 0.0], [0.0, 25.0]], [RETAIN, RETAIN], 0.1, [0.5 + 0.05 * 26**0.5, 0.5]),
        ([[1.0, -1.0], [-1.0, 4.0]], [RETAIN, RETAIN], 0.0, [0.5, 0.5]),  # c = 0
        # opposite rows: the mean is zero
        ([[1.0, -1.0], [-1.0, 1.0]], [RETAIN, RETAIN], 0.5, [0.5, 0.5]),
        ([[0.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], 0.5, [0.5, 0.5]),  # a zero row
        ([[0.0, 0.0], [0.0, 0.0]], [RETAIN, FORGET], 0.5, [0.5, -0.5]),
        ([[3.0]], [FORGET], 0.5, [-1.5]),
        ([], [], 0.5, []),
    ],
)
def test_weights(G: list[list[float]], kinds: list[int], c: float, expected: list[float]) -> None:
    gram = torch.tensor(G, dtype=torch.float64).reshape(len(kinds), len(kinds))
    found = CAGrad(c)(gram, roles(kinds))
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_radius_is_the_mean(seed: int) -> None:
    J = matrices.pulled_apart(5, 7, 0.8, seed)
    w = CAGrad(0.0)(J @ J.t(), roles_of(5, 0))
    assert torch.equal(w, torch.full((5,), 0.2, dtype=torch.float64))


def test_the_worst_row_gains_with_the_radius() -> None:
    J = matrices.pulled_apart(6, 20, 0.9)
    worst = torch.stack([(J @ direction(J, c)).min() for c in (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)])
    assert (worst.diff() > 0).all()


@pytest.mark.parametrize("c", [0.6, 2.0])
def test_where_no_direction_serves_all_the_nearest_without_conflict_is_taken(c: float) -> None:
    """Rows e, -e and a third: nothing is gained along e, and the ball reaches what conflicts with none."""
    J = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.5, 1.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([0.0, 1 / 3, 0.0], dtype=torch.float64)
    assert (direction(J, c) - expected).norm() <= 1e-11
    assert (J.t() @ DualProj()(J @ J.t(), roles_of(3, 0)) - expected).norm() <= 1e-11


def test_where_the_ball_does_not_reach_that_far_it_is_approached() -> None:
    J = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.5, 1.0, 0.0]], dtype=torch.float64)
    radius = 0.1 * J.mean(0).norm()
    expected = J.mean(0) - radius * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert (direction(J, 0.1) - expected).norm() <= 1e-11
