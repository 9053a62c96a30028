"""MUNBa: the bargain of two sides, and what is done without one."""

from __future__ import annotations

import pytest
import torch

from mtu_fast.methods import FORGET, RETAIN, MUNBa, NashMTL
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of


@pytest.mark.parametrize("seed", range(4))
def test_one_task_is_nash_of_its_two_rows(seed: int) -> None:
    J = torch.stack([matrices.random_vector(5, seed), 30.0 * matrices.random_vector(5, 10 + seed)])
    G, who = J @ J.t(), roles_of(1, 1)
    assert MUNBa()(G, who).tolist() == pytest.approx(NashMTL()(G, who).tolist(), rel=1e-10)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_both_sides_gain_alike(scale: float) -> None:
    """Two tasks with sample rows: the sides' means, summed over tasks, have equal projections, and ‖d‖² = 2."""
    J = torch.stack([matrices.random_vector(9, r) for r in range(7)])
    kinds, tasks = [RETAIN, RETAIN, FORGET, RETAIN, FORGET, FORGET, FORGET], [0, 0, 0, 1, 1, 1, 1]
    J[2], J[4:] = scale * J[2], scale * J[4:]
    d = J.t() @ MUNBa()(J @ J.t(), roles(kinds, tasks))
    r, f = J[:2].mean(0) + J[3], -(J[2] + J[4:].mean(0))
    assert float(d @ d) == pytest.approx(2.0, rel=1e-12)
    assert float(d @ r / r.norm()) == pytest.approx(float(d @ f / f.norm()), rel=1e-10)


@pytest.mark.parametrize(
    ("G", "expected"),
    [
        ([[1.0, 0.0], [0.0, 4.0]], [1.0, -0.5]),
        ([[1.0, 0.75], [0.75, 1.0]], [2.0, -2.0]),  # forget along retain: the sides conflict
        ([[4.0, 0.0], [0.0, 0.0]], [1.0, -0.1]),
        ([[0.0, 0.0], [0.0, 4.0]], [1.0, -0.1]),
        ([[4.0, 2.0], [2.0, 1.0]], [1.0, -0.1]),  # one gradient on both sides
        ([[4.0, -2.0], [-2.0, 1.0]], [0.125**0.5, -(0.5**0.5)]),
    ],
)
def test_weights(G: list[list[float]], expected: list[float]) -> None:
    w = MUNBa()(torch.tensor(G, dtype=torch.float64), roles([RETAIN, FORGET]))
    assert w.tolist() == pytest.approx(expected, rel=1e-14)


def test_a_side_that_is_missing_bargains_for_nothing() -> None:
    G = torch.eye(2, dtype=torch.float64)
    assert MUNBa()(G, roles([RETAIN, RETAIN], [0, 1])).tolist() == [1.0, 1.0]
    assert MUNBa()(G, roles([FORGET, FORGET], [0, 1])).tolist() == pytest.approx(
        [-0.1, -0.1], rel=1e-14
    )


@pytest.mark.parametrize(("gap", "bargain"), [(1e-6, True), (1e-8, False)])
def test_how_near_to_opposite_counts_as_opposite(gap: float, bargain: bool) -> None:
    J = torch.tensor([[1.0, 0.0], [1.0, gap]], dtype=torch.float64)
    assert (MUNBa()(J @ J.t(), roles_of(1, 1)).tolist() != [1.0, -0.1]) is bargain
