"""DualProj in Gram space against the cone's faces one by one."""

from __future__ import annotations

import pytest
import torch

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, DualProj
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("R", "P"), [(1, 3), (2, 3), (3, 3), (4, 8), (6, 8), (6, 3)])
@pytest.mark.parametrize("share", [0.0, 0.8])
def test_is_the_nearest_point_of_some_face(R: int, P: int, share: float) -> None:
    for seed in range(4):
        J = matrices.pulled_apart(R, P, share, seed)
        d = J.t() @ DualProj()(J @ J.t(), roles_of(R, 0))
        assert (d - reference.dualproj(J)).norm() <= 1e-10 * J.mean(0).norm()


@pytest.mark.parametrize(
    ("G", "kinds", "expected"),
    [
        ([[1.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [0.5, 0.5]),
        # a conflict, but none with the mean
        ([[1.0, -0.9], [-0.9, 1.0]], [RETAIN, RETAIN], [0.5, 0.5]),
        ([[1.0, -2.0], [-2.0, 9.0]], [RETAIN, RETAIN], [1.0, 0.5]),  # v_1 = -g_12 u_2 / g_11
        ([[9.0, 3.0], [3.0, 2.0]], [RETAIN, FORGET], [0.5, -0.75]),  # row 2 negated
        ([[9.0, -3.0], [-3.0, 2.0]], [RETAIN, FORGET], [0.5, -0.5]),
        # opposite rows: nothing is left
        ([[4.0, -2.0], [-2.0, 1.0]], [RETAIN, RETAIN], [0.5, 1.0]),
        ([[0.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [0.5, 0.5]),  # a zero row
        ([[0.0, 0.0], [0.0, 0.0]], [RETAIN, FORGET], [0.5, -0.5]),
        ([[2.0]], [FORGET], [-1.0]),
        ([], [], []),
    ],
)
def test_weights(G: list[list[float]], kinds: list[int], expected: list[float]) -> None:
    gram = torch.tensor(G, dtype=torch.float64).reshape(len(kinds), len(kinds))
    found = DualProj()(gram, roles(kinds))
    if gram.shape[0] == 2 and torch.linalg.det(gram) == 0 and gram[0, 1] < 0:  # only d is unique
        assert found @ gram @ found <= 1e-24
        assert (found >= torch.tensor(expected, dtype=torch.float64) - 1e-12).all()
        return
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("R", [2, 6, 16, 32])
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_optimality(R: int, share: float) -> None:
    """v ≥ u, J d ≥ 0, and a row's weight exceeds u only where ⟨g_i, d⟩ = 0."""
    J = matrices.scaled(matrices.pulled_apart(R, 40, share), 2)
    v, u = DualProj()(J @ J.t(), roles_of(R, 0)), 1.0 / R
    d, length, scale = J.t() @ v, J.norm(dim=1), J.mean(0).norm()
    assert (v >= u).all()
    assert (J @ d >= -1e-12 * length * scale).all()
    assert ((v - u) * (J @ d) <= 1e-12 * scale**2).all()


def test_the_mean_is_kept_where_nothing_conflicts_with_it() -> None:
    J = matrices.conditioned(5, 20, 2.0) + matrices.random_vector(20)
    assert (J @ J.mean(0) > 0).all()
    found = DualProj()(J @ J.t(), roles_of(5, 0))
    torch.testing.assert_close(
        found, torch.full((5,), 0.2, dtype=torch.float64), rtol=0, atol=1e-12
    )
