"""Exchanges of rows solve `x ≥ 0, s = M x + q ≥ 0, x·s = 0`: by kernel and by reference, on singular M too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtu_fast._ops.complementary import _exchange, complementary
from tests.helpers import matrices

pytestmark = pytest.mark.usefixtures("one_thread")

Solve = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
Make = Callable[[int, int], Tensor]

SIZES = [1, 2, 3, 8, 25, 40]
serving = pytest.mark.parametrize(
    "solve", [complementary, complementary.reference], ids=["op", "reference"]
)


def unit_gram(J: Tensor) -> Tensor:
    J = J / J.norm(dim=1, keepdim=True)
    return J @ J.t()


def independent(n: int, seed: int, pull: float = 0.9) -> Tensor:
    return unit_gram(matrices.pulled_apart(n, 2 * n, pull, seed))


def singular(n: int, seed: int) -> Tensor:
    return unit_gram(matrices.low_rank(n, 2 * n, max(n // 2, 1), seed))


def repeated(n: int, seed: int) -> Tensor:
    return unit_gram(matrices.pulled_apart(n, 2 * n, 0.9, seed)[torch.arange(n) // 2])


def vectors(K: int, n: int, seed: int) -> Tensor:
    return torch.randn(K, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_solved(M: Tensor, q: Tensor, x: Tensor, ended: Tensor, slack: float) -> None:
    """All conditions to rounding, beside the numbers that s is made of."""
    assert ended.all()
    s = x @ M + q
    size = x @ M.abs() + q.abs()
    assert (x >= 0).all()
    assert (s >= -slack * size).all()
    assert (s.abs() <= slack * size)[x > 1e-12 * x.amax(1, keepdim=True)].all()


@serving
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("pull", [0.0, 0.9])
def test_the_conditions_hold(solve: Solve, n: int, pull: float) -> None:
    for seed in range(4):
        M, q = independent(n, seed, pull), vectors(9, n, seed)
        assert_solved(M, q, *solve(M, q, False), 1e-12)


@serving
@pytest.mark.parametrize("make", [singular, repeated], ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", SIZES)
def test_the_conditions_hold_of_a_singular_matrix(solve: Solve, make: Make, n: int) -> None:
    """q in its range, as of a row that is projected: elsewhere there may be no solution."""
    for seed in range(4):
        M = make(n, seed)
        q = vectors(7, n, seed) @ M
        assert_solved(M, q, *solve(M, q, True), 1e-10)
        assert_solved(M, M, *solve(M, M, True), 1e-10)


@pytest.mark.parametrize("n", SIZES)
def test_the_kernel_is_the_reference_where_the_solution_is_unique(n: int) -> None:
    for seed in range(6):
        M, q = independent(n, seed), vectors(5, n, seed)
        found, expected = complementary(M, q, False)[0], complementary.reference(M, q, False)[0]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_of_a_singular_matrix_what_is_unique_is_the_same(n: int) -> None:
    """M x, and with it J^T x."""
    for seed in range(6):
        M = singular(n, seed)
        q = vectors(5, n, seed) @ M
        found, expected = complementary(M, q, True)[0], complementary.reference(M, q, True)[0]
        torch.testing.assert_close(found @ M, expected @ M, rtol=1e-9, atol=1e-10)


@serving
def test_one_row_is_solved_by_hand(solve: Solve) -> None:
    M, q = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[-2.0], [0.0], [3.0]]).double()
    x, ended = solve(M, q, False)
    assert x.flatten().tolist() == [2.0, 0.0, 0.0] and ended.all()


@serving
@pytest.mark.parametrize(("K", "n"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_is_solved_at_once(solve: Solve, K: int, n: int) -> None:
    x, ended = solve(torch.eye(n).double(), torch.ones(K, n).double(), False)
    assert x.shape == (K, n) and ended.shape == (K,) and ended.all()


@serving
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_end(solve: Solve, bad: float) -> None:
    M, q = independent(4, 0), vectors(1, 4, 0)
    M[2, 1] = M[1, 2] = bad
    x, ended = solve(M, q - 1.0, False)
    assert not ended.any() and (x == 0).all()
    q = vectors(3, 4, 1)
    q[1, 2] = bad
    x, ended = solve(independent(4, 0), q, False)
    assert ended.tolist() == [True, False, True] and (x[1] == 0).all()
    assert torch.equal(x[::2], solve(independent(4, 0), q[::2], False)[0])


@serving
def test_what_has_no_solution_does_not_end(solve: Solve) -> None:
    """s = q < 0 on a row that M does not reach."""
    M, q = torch.zeros(2, 2).double(), -torch.ones(1, 2).double()
    x, ended = solve(M, q, False)
    assert not ended.any() and (x == 0).all()


def test_matrices_in_any_layout_are_the_same() -> None:
    M, q = independent(6, 1), vectors(6, 6, 1)
    expected = complementary(M, q, False)[0]
    assert torch.equal(complementary(M, q.t().contiguous().t(), False)[0], expected)
    wide = torch.zeros(12, 12).double()
    wide[::2, ::2] = M
    assert torch.equal(complementary(wide[::2, ::2], q, False)[0], expected)


def test_a_problem_is_solved_alike_alone_and_beside_others() -> None:
    M, q = singular(16, 2), vectors(30, 16, 2)
    together = complementary(M, q @ M, True)[0]
    for i in range(0, 30, 7):
        alone = complementary(M, (q @ M)[i : i + 1], True)[0]
        assert torch.equal(alone[0], together[i]) or not complementary.has_kernel("CPU")


@pytest.mark.parametrize("dependent", [False, True])
def test_exchanges_that_do_not_end_go_down_row_by_row(
    monkeypatch: pytest.MonkeyPatch, dependent: bool
) -> None:
    M, q = independent(12, 0), vectors(4, 12, 0)
    expected = complementary.reference(M, q, dependent)[0]
    monkeypatch.setattr(_exchange, "PATIENCE", 0)
    for found in (
        complementary.reference(M, q, dependent)[0],
        complementary.reference(M, q[:1], dependent)[0],
    ):
        torch.testing.assert_close(found, expected[: len(found)], rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(_exchange, "DESCENTS", 0)
    assert not complementary.reference(M, q, dependent)[1].any()


REFUSED = {
    "float32": ((torch.eye(2), torch.ones(1, 2).double()), TypeError, "M is torch.float32"),
    "not square": ((torch.ones(2, 3).double(), torch.ones(1, 3).double()), ValueError, r"M has shape \[2, 3\]"),
    "another width": ((torch.eye(2).double(), torch.ones(1, 3).double()), ValueError, r"q has shape \[1, 3\]"),
    "one vector": ((torch.eye(2).double(), torch.ones(2).double()), ValueError, r"q has shape \[2\]"),
    "sparse": ((torch.eye(2).double().to_sparse(), torch.ones(1, 2).double()), TypeError, "M has the layout"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_problem_is_refused_by_name(name: str) -> None:
    arguments, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        complementary(*arguments, False)
    with pytest.raises((error, RuntimeError)):
        complementary.overload(*arguments, False)


@pytest.mark.parametrize("n", [1, 5])
def test_opcheck(n: int) -> None:
    torch.library.opcheck(complementary.overload, (independent(n, 0), vectors(3, n, 0), True))
