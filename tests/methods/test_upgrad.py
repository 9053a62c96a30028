"""UPGrad in Gram space against each row's projection by faces."""

from __future__ import annotations

import pytest
import torch

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, PCGrad, UPGrad
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of
from tests.helpers.truth import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("R", "P"), [(1, 3), (2, 3), (3, 3), (4, 8), (6, 8), (5, 3)])
@pytest.mark.parametrize("share", [0.0, 0.8])
def test_is_the_mean_of_the_projected_rows(R: int, P: int, share: float) -> None:
    for seed in range(3):
        J = matrices.pulled_apart(R, P, share, seed)
        d = J.t() @ UPGrad()(J @ J.t(), roles_of(R, 0))
        assert (d - reference.upgrad(J)).norm() <= 1e-10 * J.norm()


@pytest.mark.parametrize("seed", range(4))
def test_two_rows_are_half_of_pcgrads(seed: int) -> None:
    """w_1 = ½ (1 - min(0, g_12) / g_11): a cone of two rows has two faces, the pairwise projections."""
    J = matrices.pulled_apart(2, 5, 0.9, seed)
    G, who = J @ J.t(), roles_of(1, 1)
    torch.testing.assert_close(UPGrad()(G, who), 0.5 * PCGrad()(G, who), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("G", "kinds", "expected"),
    [
        ([[1.0, 0.5], [0.5, 4.0]], [RETAIN, RETAIN], [0.5, 0.5]),  # agreement is left alone
        ([[1.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [0.5, 0.5]),
        ([[1.0, -1.0], [-1.0, 4.0]], [RETAIN, RETAIN], [1.0, 0.625]),
        ([[1.0, 1.0], [1.0, 4.0]], [RETAIN, FORGET], [1.0, -0.625]),
        ([[1.0, -1.0], [-1.0, 4.0]], [RETAIN, FORGET], [0.5, -0.5]),
        ([[2.0, 2.0], [2.0, 2.0]], [RETAIN, RETAIN], [0.5, 0.5]),
        ([[0.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [0.5, 0.5]),
        ([[0.0, 0.0], [0.0, 0.0]], [RETAIN, FORGET], [0.5, -0.5]),
        ([[2.0]], [FORGET], [-1.0]),
        ([], [], []),
    ],
)
def test_weights(G: list[list[float]], kinds: list[int], expected: list[float]) -> None:
    gram = torch.tensor(G, dtype=torch.float64).reshape(len(kinds), len(kinds))
    found = UPGrad()(gram, roles(kinds))
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_a_conflict_of_two_leaves_an_orthogonal_third_alone() -> None:
    G = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 4.0, 0.0], [0.0, 0.0, 9.0]], dtype=torch.float64)
    expected = torch.tensor([2.0, 1.25, 1.0], dtype=torch.float64) / 3
    torch.testing.assert_close(UPGrad()(G, roles_of(3, 0)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("R", [2, 6, 16, 32])
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_no_row_is_worse_off(R: int, share: float) -> None:
    """J d ≥ 0, with weights of at least 1/T, above it where rows conflict."""
    J = matrices.scaled(matrices.pulled_apart(R, 40, share), 2)
    w = UPGrad()(J @ J.t(), roles_of(R, 0))
    d = J.t() @ w
    assert (w >= 1.0 / R).all()
    assert (J @ d >= -1e-12 * J.norm(dim=1) * d.norm()).all()
    assert relative_error(d, J.mean(0)) > (1e-3 if share else 0.0)  # something was projected
