"""Convex methods on one matrix of any size and condition: its solution's conditions hold, without the iteration.

For unit rows with weights x the update d is Σ x_i e_i. Each method's conditions are checked in the
rows themselves, beside rounding of the Gram matrix, whose root a direction may be off by.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from mtu_fast.methods import MGDA, CAGrad, DualProj, FairGrad, Method, NashMTL, UPGrad, upgrad
from tests.helpers import matrices
from tests.helpers.matrices import roles_of

pytestmark = pytest.mark.usefixtures("one_thread")

Sample = Callable[[int], Tensor]
SAMPLES: dict[str, Sample] = {
    "conflicts": lambda R: matrices.pulled_apart(R, 2 * R + 20, 0.9, seed=R),
    "plain": lambda R: matrices.pulled_apart(R, 2 * R + 20, 0.0, seed=R),
    "ill-conditioned": lambda R: matrices.conditioned(R, 2 * R, 1e4, seed=R),
    "low rank": lambda R: matrices.low_rank(R, 2 * R, max(R // 2, 1), seed=R),
    "duplicates": lambda R: matrices.pulled_apart(R // 2, R + 20, 0.9, seed=R).repeat(2, 1),
    "opposite": lambda R: matrices.with_duplicates(matrices.pulled_apart(R // 2, R, 0.0, seed=R)),
    "zero row": lambda R: matrices.with_zero_row(matrices.pulled_apart(R, R + 20), at=R // 2),
    "more rows than P": lambda R: matrices.pulled_apart(R, 3, 0.5, seed=R),
}
SIZES = [4, 8, 16, 32, 48, 64, 128, 192]
sampled = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
sized = pytest.mark.parametrize("R", SIZES)


def rows_of(sample: Sample, R: int) -> Tensor:
    """Rows [R, P], the longest of length 1."""
    J = sample(R)
    return J / J.norm(dim=1).max()


def weights(method: Method, J: Tensor) -> Tensor:
    w: Tensor = method(J @ J.t(), roles_of(len(J), 0))
    assert w.isfinite().all()
    return w


@sampled
@sized
def test_dualproj_is_the_projection_of_the_mean(sample: Sample, R: int) -> None:
    """v ≥ u, J d ≥ 0, (v - u)·J d = 0."""
    J = rows_of(sample, R)
    v = weights(DualProj(), J)
    gain = J @ (J.t() @ v)
    assert (v >= 1.0 / R).all()
    assert (gain >= -1e-12).all()
    assert ((v - 1.0 / R) * gain).abs().max() <= 1e-12


@sampled
@pytest.mark.parametrize("R", [4, 8, 16, 32, 48, 64])
def test_upgrad_is_the_mean_of_projections(sample: Sample, R: int) -> None:
    """Each row's projection by DualProj's solver, batched on its device: the interior point, to its accuracy."""
    J = rows_of(sample, R)
    w = weights(UPGrad(), J)
    truth = J.t() @ upgrad._on_device(J @ J.t(), roles_of(R, 0))
    assert (w >= 1.0 / R).all()
    assert (J @ (J.t() @ w) >= -1e-11).all()
    assert (J.t() @ w - truth).norm() <= 1e-9


@sampled
@sized
def test_mgda_is_the_shortest_of_the_hull(sample: Sample, R: int) -> None:
    """w ≥ 0 of sum 1, and ⟨g_i, d⟩ ≥ ‖d‖² for every row."""
    J = rows_of(sample, R)
    w = weights(MGDA(), J)
    d = J.t() @ w
    assert (w >= 0).all() and abs(float(w.sum()) - 1.0) <= 1e-12
    assert (J @ d >= d @ d - 1e-12).all()


@sampled
@sized
def test_cagrad_stays_in_its_ball_and_serves_the_worst_row_no_worse(sample: Sample, R: int) -> None:
    """‖d - g_0‖ ≤ c ‖g_0‖; d - g_0 = Σ x_i g_i with x ≥ 0 on rows of least gain alone."""
    J = rows_of(sample, R)
    w = weights(CAGrad(0.5), J)
    mean, x = J.mean(0), w - 1.0 / R
    d = J.t() @ w
    gain = J @ d
    assert (x >= -1e-15).all()
    assert (d - mean).norm() <= 0.5 * mean.norm() * (1 + 1e-9) + 1e-12
    assert (x * (gain - gain.min())).abs().max() <= 1e-10


@pytest.mark.parametrize("method", [NashMTL(), FairGrad(2.0)], ids=repr)
@sampled
@sized
def test_bargains_hold_their_equation_or_move_nothing(
    sample: Sample, R: int, method: NashMTL | FairGrad
) -> None:
    """(G w)_i = w_i^(-1/a)."""
    J = rows_of(sample, R)
    w = weights(method, J)
    if not w.any():
        return
    alive = J.norm(dim=1) > 0
    power = 1.0 if isinstance(method, NashMTL) else 1.0 / method.a
    gain = (J @ (J.t() @ w))[alive]
    wanted = w[alive] ** -power
    assert ((gain - wanted).abs() <= 1e-8 * wanted.max()).all()


@pytest.mark.parametrize(
    "method", [DualProj(), UPGrad(), MGDA(), CAGrad(0.5), NashMTL(), FairGrad(2.0)], ids=repr
)
@sampled
@pytest.mark.parametrize("R", [4, 16, 32])
def test_one_matrix_is_left_to_no_iteration(
    method: Method, sample: Sample, R: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchanges and Newton's steps end on dependent rows, too."""

    def refused(*_: object) -> Tensor:
        raise AssertionError("left to the iteration")

    monkeypatch.setattr("mtu_fast.methods._programs.complementary", refused)
    monkeypatch.setattr("mtu_fast.methods._ball.complementary", refused)
    monkeypatch.setattr("mtu_fast.methods._bargaining._iterated", refused)
    weights(method, rows_of(sample, R))
