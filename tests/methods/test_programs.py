"""What MGDA, CAGrad, DualProj and UPGrad have in common, and the solver under them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast.methods import FORGET, MGDA, RETAIN, SUBSPACE, CAGrad, DualProj, Method, UPGrad
from mtu_fast.methods._programs import complementary
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = [MGDA(), CAGrad(0.5), DualProj(), UPGrad()]
KINDS = [RETAIN, FORGET, RETAIN, RETAIN, FORGET]
every = pytest.mark.parametrize("method", METHODS, ids=repr)
# Row sets whose Gram matrix is singular, and the weights therefore not unique.
SINGULAR = {
    "duplicates": matrices.with_duplicates(matrices.pulled_apart(4, 9), times=2).abs(),
    "opposite duplicates": matrices.with_duplicates(matrices.pulled_apart(4, 9), times=3),
    "zero row": matrices.with_zero_row(matrices.pulled_apart(5, 9), at=2),
    "low rank": matrices.low_rank(12, 30, rank=4),
    "more rows than P": matrices.pulled_apart(20, 7, 0.5),
    "sum zero": matrices.pulled_apart(6, 9, 1.0),
    "many equal": matrices.pulled_apart(4, 9).repeat(8, 1),
    "one line": torch.tensor([[1.0], [-2.0], [3.0], [-0.5]], dtype=torch.float64),
    "all zero": torch.zeros(3, 4, dtype=torch.float64),
}
singular = pytest.mark.parametrize("J", SINGULAR.values(), ids=SINGULAR)


def direction(method: Method, J: Tensor) -> Tensor:
    return J.t() @ method(J @ J.t(), roles_of(len(J), 0))


@pytest.mark.parametrize("R", [1, 2, 6, 16, 48])
@pytest.mark.parametrize("rank", [1, 4, 100])
def test_complementary_solves_what_it_says(R: int, rank: int) -> None:
    """x ≥ 0, s = M x + q ≥ 0, x·s = 0, with M of any rank; a solution exists as q is in its range, or positive."""
    J = matrices.low_rank(R, max(R, rank), min(R, rank), seed=R)
    J = J / J.norm(dim=1, keepdim=True)
    M = J @ J.t()
    for q in (
        J @ matrices.random_vector(J.shape[1]) / 5,
        torch.linspace(0, 1, R, dtype=torch.float64),
    ):
        x = complementary(M, q)
        s = M @ x + q
        assert (x >= 0).all() and (s >= -1e-12).all()
        assert (x * s).abs().max() <= 1e-12


@every
@singular
def test_moderate_weights_on_singular_rows(method: Method, J: Tensor) -> None:
    w = method(J @ J.t(), roles_of(len(J), 0))
    assert torch.isfinite(w).all() and (w >= 0).all()
    assert (w * J.norm(dim=1)).max() <= 1e3 * J.norm(dim=1).max()


@pytest.mark.parametrize("method", [MGDA(), DualProj(), UPGrad()], ids=repr)
@singular
def test_no_conflict_on_singular_rows(method: Method, J: Tensor) -> None:
    d = direction(method, J)
    assert (J @ d >= -1e-10 * J.norm() ** 2).all()


@every
def test_repeated_rows_make_no_difference_to_the_direction(method: Method) -> None:
    """All rows three times: the mean, the hull and the cone are the same."""
    J = matrices.pulled_apart(4, 9, 0.7)
    assert (direction(method, J.repeat(3, 1)) - direction(method, J)).norm() <= 1e-10 * J.norm()


@every
def test_forget_rows_are_ascended(method: Method) -> None:
    """They enter negated, and come back so."""
    J = matrices.pulled_apart(5, 7)
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    found = J.t() @ method(J @ J.t(), roles(KINDS))
    assert (found - direction(method, J * sign[:, None])).norm() <= 1e-12 * J.norm()


@every
def test_a_side_alone(method: Method) -> None:
    """Forget rows alone are retain rows upside down."""
    J = matrices.pulled_apart(4, 7, 0.5)
    G = J @ J.t()
    assert torch.equal(method(G, roles_of(0, 4)), -method(G, roles_of(4, 0)))


@every
def test_kept_rows_take_no_part(method: Method) -> None:
    J = matrices.pulled_apart(5, 7, 0.5)
    with_kept = method(J @ J.t(), roles([RETAIN, SUBSPACE, RETAIN, FORGET, SUBSPACE]))
    taking = [0, 2, 3]
    without = method(J[taking] @ J[taking].t(), roles([RETAIN, RETAIN, FORGET]))
    torch.testing.assert_close(with_kept[taking], without, rtol=1e-10, atol=1e-10)
    assert with_kept[1] == 0 and with_kept[4] == 0


@every
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_weights_do_not_depend_on_the_scale_of_the_loss(method: Method, factor: float) -> None:
    J = matrices.pulled_apart(5, 7)
    G = J @ J.t()
    torch.testing.assert_close(
        method(factor**2 * G, roles(KINDS)), method(G, roles(KINDS)), rtol=1e-10, atol=1e-12
    )


@every
def test_order_of_rows_makes_no_difference(method: Method) -> None:
    J, order = matrices.pulled_apart(5, 7), torch.tensor([3, 0, 4, 2, 1])
    G = J @ J.t()
    shuffled = method(G[order][:, order], roles([KINDS[i] for i in order.tolist()]))
    torch.testing.assert_close(shuffled, method(G, roles(KINDS))[order], rtol=1e-10, atol=1e-12)


@every
def test_a_batch_is_its_matrices_one_by_one(method: Method) -> None:
    """Easy and hard, long and short together: each problem rests when it is solved."""
    sets = [
        matrices.pulled_apart(5, 7, seed % 2 * 0.9, seed) * 10.0 ** (seed - 3) for seed in range(4)
    ]
    sets += [torch.eye(5, 7, dtype=torch.float64), matrices.with_zero_row(sets[0], 1)]
    G = torch.stack([J @ J.t() for J in sets]).view(2, 3, 5, 5)
    one_by_one = torch.stack([method(g, roles(KINDS)) for g in G.view(6, 5, 5)]).view(2, 3, 5)
    torch.testing.assert_close(method(G, roles(KINDS)), one_by_one, rtol=1e-11, atol=1e-11)


@every
def test_before_surgery_every_row_counts_alike(method: Method) -> None:
    expected = torch.tensor([0.25, 0.25, -0.25, 0.0, 0.25], dtype=torch.float64)
    assert torch.equal(method.outside(roles([RETAIN, RETAIN, FORGET, SUBSPACE, RETAIN])), expected)


@pytest.mark.parametrize("method", [DualProj(), UPGrad()], ids=repr)
def test_without_conflict_nothing_changes(method: Method) -> None:
    J = matrices.pulled_apart(6, 20, 0.0).abs()
    who = roles_of(6, 0)
    torch.testing.assert_close(method(J @ J.t(), who), method.outside(who), rtol=0, atol=1e-12)


@every
def test_same_weights_every_time(method: Method) -> None:
    J, before = matrices.pulled_apart(6, 7), torch.get_rng_state()
    G, who = J @ J.t(), roles_of(4, 2)
    assert torch.equal(method(G, who), method(G, who))
    assert torch.equal(torch.get_rng_state(), before)
