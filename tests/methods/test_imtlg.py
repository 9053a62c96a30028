"""IMTL-G: equal projections."""

from __future__ import annotations

import pytest
import torch

from mtu_fast.methods import FORGET, IMTLG, RETAIN
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of
from tests.helpers.truth import relative_error


@pytest.mark.parametrize("R", [2, 3, 8])
@pytest.mark.parametrize("cond", [3.0, 3e2])
def test_all_rows_are_improved_alike(R: int, cond: float) -> None:
    J = matrices.scaled(matrices.conditioned(R, 12, cond, seed=R), 3)
    w = IMTLG()(J @ J.t(), roles_of(R, 0))
    projections = J @ (J.t() @ w) / J.norm(dim=1)
    assert float(w.sum()) == pytest.approx(1.0, rel=1e-9)
    assert relative_error(projections, projections.mean().expand(R)) <= 1e-9


@pytest.mark.parametrize(
    ("G", "kinds", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [RETAIN, RETAIN], [0.5, 0.5]),
        # two rows: as 1 / length, at any angle
        ([[1.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [2 / 3, 1 / 3]),
        ([[1.0, 1.2], [1.2, 4.0]], [RETAIN, RETAIN], [2 / 3, 1 / 3]),
        ([[1.0, 1.2], [1.2, 4.0]], [RETAIN, FORGET], [2 / 3, -1 / 3]),
        ([[1.0, 2.0], [2.0, 4.0]], [RETAIN, RETAIN], [2 / 3, 1 / 3]),  # one direction
        ([[1.0, -2.0], [-2.0, 4.0]], [RETAIN, RETAIN], [0.0, 0.0]),  # opposite: no such direction
        ([[1.0, 2.0], [2.0, 4.0]], [RETAIN, FORGET], [0.0, 0.0]),
        ([[0.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [0.0, 1.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [RETAIN, FORGET], [0.0, 0.0]),
        ([[9.0]], [FORGET], [-1.0]),
    ],
)
def test_weights(G: list[list[float]], kinds: list[int], expected: list[float]) -> None:
    w = IMTLG()(torch.tensor(G, dtype=torch.float64), roles(kinds))
    assert w.tolist() == pytest.approx(expected, abs=1e-12)


def test_float32_rows_that_are_opposite_to_rounding_have_no_direction() -> None:
    J = torch.stack([matrices.random_vector(50, 1), matrices.random_vector(50, 1)])
    J[1] *= -1.0
    J[1, 0] += 1e-7
    assert IMTLG()(J @ J.t(), roles_of(2, 0, torch.float32)).tolist() == [0.0, 0.0]
