"""MGDA in Gram space against the hull's faces one by one."""

from __future__ import annotations

import pytest
import torch

from mtu_fast import reference
from mtu_fast.methods import FORGET, MGDA, RETAIN
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of
from tests.helpers.truth import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("R", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("share", [0.0, 0.8])
def test_is_the_nearest_point_of_some_face(R: int, share: float) -> None:
    for seed in range(4):
        J = matrices.pulled_apart(R, 8, share, seed)
        assert relative_error(J.t() @ MGDA()(J @ J.t(), roles_of(R, 0)), reference.mgda(J)) <= 1e-12


def test_hull_around_zero() -> None:
    """More rows than dimensions: the direction is zero, to the rounding of the rows."""
    for seed in range(4):
        J = matrices.pulled_apart(6, 2, 1.0, seed)
        d = J.t() @ MGDA()(J @ J.t(), roles_of(6, 0))
        assert reference.mgda(J).norm() <= 1e-12 and d.norm() <= 1e-10


@pytest.mark.parametrize(
    ("g11", "g12", "g22", "first"),
    [
        (1.0, 0.0, 1.0, 0.5),
        (1.0, 0.0, 4.0, 0.8),
        (1.0, -1.0, 4.0, 5 / 7),
        (1.0, 0.5, 4.0, 7 / 8),
        (1.0, 1.0, 4.0, 1.0),  # on the edge of the formula
        (1.0, 1.5, 4.0, 1.0),  # cut
        (9.0, 5.0, 4.0, 0.0),
        (1.0, -2.0, 4.0, 2 / 3),  # opposite
    ],
)
def test_two_rows(g11: float, g12: float, g22: float, first: float) -> None:
    """w_1 = (g_22 - g_12) / (g_11 + g_22 - 2 g_12) in [0, 1]."""
    G = torch.tensor([[g11, g12], [g12, g22]], dtype=torch.float64)
    expected = torch.tensor([first, 1.0 - first], dtype=torch.float64)
    torch.testing.assert_close(MGDA()(G, roles_of(2, 0)), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("G", "kinds", "expected"),
    [
        # ~ 1/length²
        ([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 4.0]], [RETAIN] * 3, [4 / 7, 2 / 7, 1 / 7]),
        ([[1.0, 0.5], [0.5, 4.0]], [RETAIN, FORGET], [0.75, -0.25]),
        (
            [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]],
            [RETAIN, FORGET, RETAIN],
            [0.5, -0.5, 0.0],
        ),
        ([[2.0]], [FORGET], [-1.0]),
        ([[0.0]], [RETAIN], [1.0]),
        ([], [], []),
    ],
)
def test_weights(G: list[list[float]], kinds: list[int], expected: list[float]) -> None:
    gram = torch.tensor(G, dtype=torch.float64).reshape(len(kinds), len(kinds))
    found = MGDA()(gram, roles(kinds))
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("R", [2, 6, 16, 32])
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_optimality(R: int, share: float) -> None:
    """In the simplex, and ⟨g_i, d⟩ ≥ ‖d‖²: no row's side of the hull is nearer to 0."""
    J = matrices.scaled(matrices.pulled_apart(R, 40, share), 2)
    w = MGDA()(J @ J.t(), roles_of(R, 0))
    d = J.t() @ w
    assert (w >= 0).all() and (w.sum() - 1).abs() <= 1e-14
    assert (J @ d - d @ d >= -1e-10 * J.norm(dim=1) * d.norm()).all()
