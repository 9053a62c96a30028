"""PCGrad in Gram space against the paper's loop over gradient vectors."""

from __future__ import annotations

import pytest
import torch

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, PCGrad
from mtu_fast.methods._orders import visiting_orders
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of
from tests.helpers.truth import relative_error


def _conflicting(R: int, P: int, seed: int) -> torch.Tensor:
    """Rows most pairs of which conflict: their mean is taken away."""
    J = torch.stack([matrices.random_vector(P, 100 * seed + r) for r in range(R)])
    return J - 0.9 * J.mean(0)


@pytest.mark.parametrize("R", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_is_the_papers_loop(R: int, seed: int) -> None:
    J = _conflicting(R, 5, seed)
    w = PCGrad()(J @ J.t(), roles([RETAIN] * R, list(range(R))))
    assert relative_error(J.t() @ w, reference.pcgrad(J)) <= 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_is_the_papers_loop_in_random_order(seed: int) -> None:
    J = _conflicting(6, 9, seed)
    w = PCGrad(torch.Generator().manual_seed(seed))(J @ J.t(), roles_of(6, 0))
    orders = visiting_orders(6, torch.Generator().manual_seed(seed)).tolist()
    assert relative_error(J.t() @ w, reference.pcgrad(J, orders)) <= 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_forget_rows_are_ascended(seed: int) -> None:
    """They enter negated, and come back so: the loop on the negated vectors gives the direction itself."""
    J, kinds = _conflicting(5, 7, seed), [RETAIN, FORGET, RETAIN, FORGET, FORGET]
    signed = (
        J
        * torch.tensor([1.0 if kind == RETAIN else -1.0 for kind in kinds], dtype=J.dtype)[:, None]
    )
    w = PCGrad()(J @ J.t(), roles(kinds, [0, 0, 1, 1, 2]))
    assert relative_error(J.t() @ w, reference.pcgrad(signed)) <= 1e-12


@pytest.mark.parametrize(
    ("G", "kinds", "expected"),
    [
        ([[1.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [1.0, 1.0]),
        ([[1.0, 0.5], [0.5, 4.0]], [RETAIN, RETAIN], [1.0, 1.0]),  # agreement is left alone
        ([[1.0, -1.0], [-1.0, 4.0]], [RETAIN, RETAIN], [2.0, 1.25]),
        ([[1.0, 1.0], [1.0, 4.0]], [RETAIN, FORGET], [2.0, -1.25]),
        ([[1.0, -1.0], [-1.0, 4.0]], [RETAIN, FORGET], [1.0, -1.0]),
        ([[1.0, -1.0], [-1.0, 1.0]], [RETAIN, RETAIN], [2.0, 2.0]),  # opposite rows cancel
        ([[0.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [1.0, 1.0]),  # a zero row
        ([[0.0, 0.0], [0.0, 0.0]], [RETAIN, FORGET], [1.0, -1.0]),
        ([[2.0]], [FORGET], [-1.0]),
        ([], [], []),
    ],
)
def test_weights(G: list[list[float]], kinds: list[int], expected: list[float]) -> None:
    gram = torch.tensor(G, dtype=torch.float64).reshape(len(kinds), len(kinds))
    assert torch.equal(PCGrad()(gram, roles(kinds)), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(4))
def test_two_tasks_end_without_conflict(seed: int) -> None:
    J = _conflicting(2, 6, seed)
    d = J.t() @ PCGrad()(J @ J.t(), roles_of(2, 0))
    assert (J @ d >= -1e-12).all()


def test_a_batch_is_its_matrices_one_by_one() -> None:
    G = torch.stack([J @ J.t() for J in (_conflicting(4, 6, seed) for seed in range(6))]).view(
        2, 3, 4, 4
    )
    who = roles([RETAIN, FORGET, RETAIN, RETAIN])
    batched = PCGrad()(G, who)
    one_by_one = torch.stack([PCGrad()(g, who) for g in G.view(6, 4, 4)]).view(2, 3, 4)
    torch.testing.assert_close(batched, one_by_one, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_weights_do_not_depend_on_the_scale_of_the_loss(factor: float) -> None:
    J = _conflicting(5, 7, 0)
    G = J @ J.t()
    assert (
        relative_error(PCGrad()(factor**2 * G, roles_of(5, 0)), PCGrad()(G, roles_of(5, 0)))
        <= 1e-12
    )


def test_same_order_every_time_unless_drawn() -> None:
    J = _conflicting(6, 7, 1)
    G, who = J @ J.t(), roles_of(6, 0)
    assert torch.equal(PCGrad()(G, who), PCGrad()(G, who))
    drawn = PCGrad(torch.Generator().manual_seed(0))
    assert not torch.equal(drawn(G, who), drawn(G, who))


def test_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    PCGrad(torch.Generator().manual_seed(0))(torch.eye(4, dtype=torch.float64), roles_of(4, 0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(3)])
def test_every_row_meets_every_other_once(generator: torch.Generator | None) -> None:
    orders = visiting_orders(5, generator)
    for i, order in enumerate(orders.tolist()):
        assert sorted(order) == [j for j in range(5) if j != i]
