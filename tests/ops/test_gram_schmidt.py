"""The rank-revealing solve, as dispatched (the kernel, where it is built) and as the reference, against the truth.

Truth is Gram-Schmidt with reorthogonalisation on the rows themselves, in extended precision and
without a Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtu_fast._ops import _library
from mtu_fast._ops.gram_schmidt import (
    TOLERANCE,
    condition,
    effective_rank,
    gram_schmidt,
    serving,
    solve,
)
from tests.helpers import matrices
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.truth import relative_error

EPS32 = torch.finfo(torch.float32).eps
TOL = TOLERANCE[torch.float64]
Solve = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
IMPLEMENTATIONS = {"dispatched": solve, "reference": gram_schmidt.reference}
CONDITIONS = [6.0, 6e2, 6e3, 6e4]


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request: pytest.FixtureRequest) -> Solve:
    return IMPLEMENTATIONS[request.param]


def true_projection(J: Tensor, g: Tensor, tol: float = 1e-9) -> tuple[Tensor, int]:
    """g on the span of the rows of J, and the dimension of that span, in extended precision."""
    basis = np.zeros((0, J.shape[1]), dtype=np.longdouble)
    for row in J.double().numpy().astype(np.longdouble):
        left = row / (np.sqrt(row @ row) or 1)
        for _ in range(2):
            left = left - basis.T @ (basis @ left)
        if np.sqrt(left @ left) >= tol:
            basis = np.vstack([basis, left / np.sqrt(left @ left)])
    wide = basis.T @ (basis @ g.double().numpy().astype(np.longdouble))
    return torch.from_numpy(wide.astype(np.float64)), len(basis)


def project(
    run: Solve, J: Tensor, g: Tensor, tol: float = TOL, active: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Jᵀ x and the rank, through the float64 Gram matrix of the rows."""
    J = J.double()
    active = torch.ones(J.shape[-2], dtype=torch.bool) if active is None else active
    x, rank = run(J @ J.mT, (J @ g.double()[..., None]).squeeze(-1), active, tol)
    return (x[..., None, :] @ J).squeeze(-2), rank


@pytest.mark.parametrize("cond", CONDITIONS)
def test_errs_at_most_twice_what_a_plain_cholesky_solve_errs(run: Solve, cond: float) -> None:
    J = torch.stack([matrices.conditioned(24, 60, cond, seed) for seed in range(8)])
    g = torch.stack([matrices.balanced_vector(rows, seed) for seed, rows in enumerate(J)])
    truth = torch.stack([
        true_projection(rows, vector)[0] for rows, vector in zip(J, g, strict=True)
    ])
    found, rank = project(run, J, g)
    weights = torch.cholesky_solve(J @ g[..., None], torch.linalg.cholesky(J @ J.mT))
    assert_as_accurate(f"cond {cond:g}", found, (weights.mT @ J).squeeze(-2), truth)
    assert rank.tolist() == [24] * 8


@pytest.mark.parametrize("cond", CONDITIONS)
def test_float32_rows(run: Solve, cond: float) -> None:
    J = matrices.conditioned(32, 100, cond).float()
    anything, balanced = matrices.random_vector(100), matrices.balanced_vector(J)
    found, rank = project(run, J, balanced, TOLERANCE[torch.float32])
    assert relative_error(found, true_projection(J, balanced)[0]) <= 64 * EPS32 * cond
    assert rank == 32
    if cond <= 1e3:
        found, _ = project(run, J, anything, TOLERANCE[torch.float32])
        assert relative_error(found, true_projection(J, anything)[0]) <= 1e-5


ROW_SETS = {
    "duplicated rows": matrices.with_duplicates(matrices.conditioned(8, 30, 6e2)),
    "duplicated three times": matrices.with_duplicates(matrices.conditioned(5, 30, 6.0), 3),
    "a zero row": matrices.with_zero_row(matrices.conditioned(9, 30, 6.0), 4),
    "only zero rows": torch.zeros(4, 7, dtype=torch.float64),
    "low rank": matrices.low_rank(20, 40, 7),
    "more rows than parameters": matrices.conditioned(20, 6, 6.0),
    "lengths over twelve decades": matrices.scaled(matrices.conditioned(12, 40, 6.0), 12),
    "one row": matrices.conditioned(1, 5, 1.0),
    "as many rows as are promised": matrices.low_rank(512, 300, 200),
}


@pytest.mark.parametrize("name", ROW_SETS)
def test_projection_and_rank(run: Solve, name: str) -> None:
    J = ROW_SETS[name]
    g = matrices.random_vector(J.shape[1])
    truth, rank = true_projection(J, g)
    found, found_rank = project(run, J, g)
    assert found_rank == rank
    assert (found - truth).norm() <= 1e-9 * g.norm()


@pytest.mark.parametrize("left", [0.5, 2.0])
def test_a_row_counts_from_the_tolerance_on(run: Solve, left: float) -> None:
    tol = 1e-3
    J = torch.eye(3, 4, dtype=torch.float64)
    J[2] = J[0] + left * tol * J[2]  # of length 1 to the sixth digit, with `left · tol` of its own
    x, rank = run(J @ J.T, J @ matrices.random_vector(4), torch.ones(3, dtype=torch.bool), tol)
    assert rank == (3 if left > 1 else 2)
    assert (x == 0).sum() == (0 if left > 1 else 1)


def test_dependent_and_inactive_rows_weigh_nothing(run: Solve) -> None:
    J = matrices.with_duplicates(matrices.conditioned(4, 9, 6.0))
    active = torch.tensor([True] * 6 + [False] * 2)
    g = matrices.random_vector(9)
    x, rank = run(J @ J.T, J @ g, active, TOL)
    assert rank == 4
    assert (x[6:] == 0).all()
    assert (x != 0).sum() == 4
    found, _ = project(run, J, g, active=active)
    assert relative_error(found, true_projection(J[active], g)[0]) <= 1e-12


def test_nothing_active(run: Solve) -> None:
    x, rank = run(
        torch.eye(3).double(), torch.ones(3).double(), torch.zeros(3, dtype=torch.bool), TOL
    )
    assert x.tolist() == [0, 0, 0]
    assert rank.dtype == torch.int64 and rank.shape == () and rank == 0


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2), (2, 0, 4)])
def test_empty(run: Solve, shape: tuple[int, ...]) -> None:
    G, rhs = torch.zeros(*shape, shape[-1]).double(), torch.zeros(shape).double()
    x, rank = run(G, rhs, torch.ones(shape[-1], dtype=torch.bool), TOL)
    assert x.shape == shape
    assert rank.shape == shape[:-1]
    assert not rank.any()


def test_leading_dimensions_and_strides(run: Solve) -> None:
    J = torch.stack([matrices.conditioned(5, 12, 6.0, seed) for seed in range(6)]).view(2, 3, 5, 12)
    g = matrices.random_vector(12)
    G, rhs, active = J @ J.mT, J @ g, torch.tensor([True, False, True, True, True])
    whole, ranks = run(G, rhs, active, TOL)
    assert ranks.tolist() == [[4, 4, 4], [4, 4, 4]]
    for i in range(2):
        for j in range(3):
            assert relative_error(run(G[i, j], rhs[i, j], active, TOL)[0], whole[i, j]) <= 1e-13
    strided, _ = run(
        G.mT.transpose(0, 1), rhs.transpose(0, 1), active.repeat_interleave(2)[::2], TOL
    )
    assert relative_error(strided, whole.transpose(0, 1)) <= 1e-13
    broadcast, _ = run(G[0, 0].expand(4, 5, 5), rhs[0, 0].expand(4, 5), active, TOL)
    assert relative_error(broadcast, whole[0, 0].expand(4, 5)) <= 1e-13


@pytest.mark.parametrize("where", [(1, 1), (0, 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(run: Solve, where: tuple[int, int], value: float) -> None:
    J = matrices.conditioned(4, 9, 6.0)
    G = (J @ J.T).expand(2, 4, 4).clone()
    for i, j in (where, where[::-1]):
        G[0, i, j] = value
    x, rank = run(G, torch.ones(2, 4).double(), torch.ones(4, dtype=torch.bool), TOL)
    assert not x[0].isfinite().all()
    assert x[1].isfinite().all()
    assert rank[1] == 4


def test_not_finite_but_inactive_is_ignored(run: Solve) -> None:
    G, rhs = torch.eye(3).double(), torch.ones(3).double()
    G[1], G[:, 1], rhs[1] = float("nan"), float("nan"), float("nan")
    x, rank = run(G, rhs, torch.tensor([True, False, True]), TOL)
    assert x.tolist() == [1, 0, 1]
    assert rank == 2


def test_literal_values(run: Solve) -> None:
    G = torch.tensor([[4.0, 2.0], [2.0, 9.0]]).double()
    x, rank = run(G, torch.tensor([2.0, 5.0]).double(), torch.tensor([True, True]), TOL)
    torch.testing.assert_close(x, torch.tensor([0.25, 0.5]).double(), rtol=1e-15, atol=0)
    assert rank == 2


@pytest.mark.parametrize("seed", range(4))
def test_rounding_does_not_choose_the_rows(run: Solve, seed: int) -> None:
    """Scaled to length one all rows are as long: at a rough tolerance another first pivot is another projection."""
    torch.manual_seed(seed)
    J = torch.randn(24, 3, dtype=torch.float64) @ torch.randn(3, 60, dtype=torch.float64)
    J += 3e-3 * torch.randn_like(J)
    g = torch.randn(60, dtype=torch.float64)
    expected, rank = project(run, J, g, tol=1e-2)
    for _ in range(8):  # lengths change no direction, only how their squares are rounded
        length = torch.rand(24, 1, dtype=torch.float64) + 1.0
        found, found_rank = project(run, length * J, g, tol=1e-2)
        assert found_rank == rank
        assert relative_error(found, expected) <= 1e-9


def test_effective_rank() -> None:
    J = matrices.with_zero_row(matrices.with_duplicates(matrices.conditioned(4, 9, 6.0)), 1)
    assert effective_rank(torch.stack([J @ J.T, torch.eye(8).double()]), TOL).tolist() == [4, 8]


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 2, 5), (0,)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    J = torch.randn(*shape, 9, dtype=torch.float64)
    rhs, active = torch.randn(shape, dtype=torch.float64), torch.arange(shape[-1]) != 1
    torch.library.opcheck(gram_schmidt.overload, (J @ J.mT, rhs, active, TOL))


built = pytest.mark.skipif(_library.EXTENSION is None, reason=_library.MISSING or "built")


@built
def test_the_kernel_is_what_runs() -> None:
    arguments = (
        torch.eye(3).double(),
        torch.ones(3).double(),
        torch.ones(3, dtype=torch.bool),
        TOL,
    )
    assert gram_schmidt.has_kernel("CPU")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gram_schmidt(*arguments)
    names = {event.key for event in profile.key_averages()}
    assert "mtu_fast::gram_schmidt" in names
    assert "aten::gather" not in names  # the reference gathers at every step


@built
def test_the_same_bits_whatever_the_threads_and_the_batch() -> None:
    J = torch.randn(300, 32, 64, dtype=torch.float64)
    G, rhs, active = (
        J @ J.mT,
        torch.randn(300, 32, dtype=torch.float64),
        torch.ones(32, dtype=torch.bool),
    )
    several = solve(G, rhs, active, TOL)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(solve(G, rhs, active, TOL)[0], several)
        assert torch.equal(solve(G[7], rhs[7], active, TOL)[0], several[7])
    finally:
        torch.set_num_threads(threads)


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"G": torch.eye(3)}, "float64"),
        ({"G": torch.zeros(3, 4).double()}, "square"),
        ({"G": torch.eye(3).double()[0]}, "dimensions"),
        ({"rhs": torch.ones(2).double()}, "dimension 0"),
        ({"active": torch.ones(3)}, "bool"),
        ({"active": torch.ones(2, dtype=torch.bool)}, "active flag"),
    ],
)
def test_the_kernel_checks_its_own_arguments(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "G": torch.eye(3).double(),
        "rhs": torch.ones(3).double(),
        "active": torch.ones(3, dtype=torch.bool),
    }
    with pytest.raises(RuntimeError, match=message):
        gram_schmidt.overload(**{**arguments, **change}, tol=TOL)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"G": torch.eye(3)}, TypeError, r"G is torch\.float32, expected torch\.float64"),
        ({"rhs": torch.ones(3)}, TypeError, r"rhs is torch\.float32"),
        ({"active": torch.ones(3)}, TypeError, r"active is torch\.float32, expected torch\.bool"),
        (
            {"G": torch.zeros(3, 4).double()},
            ValueError,
            r"G has shape \[3, 4\], expected \[\.\.\., R, R\]",
        ),
        (
            {"G": torch.zeros(2, 3, 3).double()},
            ValueError,
            r"rhs has shape \[3\], expected \[2, 3\]",
        ),
        (
            {"active": torch.ones(2, dtype=torch.bool)},
            ValueError,
            r"active has shape \[2\], expected \[3\]",
        ),
        ({"active": torch.ones(3, dtype=torch.bool, device="meta")}, ValueError, "active on meta"),
        ({"tol": 0.0}, ValueError, r"tol is 0\.0"),
        ({"tol": float("nan")}, ValueError, "tol is nan"),
    ],
)
def test_errors_teach(
    change: dict[str, Tensor | float], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Tensor | float] = {
        "G": torch.eye(3).double(),
        "rhs": torch.ones(3).double(),
        "active": torch.ones(3, dtype=torch.bool),
        "tol": TOL,
    }
    with pytest.raises(error, match=message):
        solve(**{**arguments, **change})


@pytest.mark.parametrize(
    ("rows", "capability", "kernel"),
    [(512, (9, 0), True), (4096, (9, 0), False), (8, (7, 5), False)],
)
def test_what_the_cuda_kernels_do_not_reach_goes_to_the_reference(
    rows: int, capability: tuple[int, int], kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    G: Any = SimpleNamespace(is_cuda=True, shape=(rows, rows), device="cuda:0")
    expected = gram_schmidt.unchecked if kernel else gram_schmidt.reference
    assert serving(gram_schmidt, G) == expected


@pytest.mark.parametrize("cond", [6.0, 60.0, 6e2, 6e4])
@pytest.mark.parametrize("R", [4, 32, 128])
def test_the_condition_is_estimated_within_a_factor_of_two(R: int, cond: float) -> None:
    J = torch.stack([matrices.conditioned(R, 300, cond, seed) for seed in range(3)])
    length = J.norm(dim=-1)
    values = torch.linalg.svdvals(J / length[..., None])
    found = condition(J @ J.mT, length, TOL) / (values[..., 0] / values[..., -1])
    assert found.shape == (3,) and bool((found > 0.5).all() and (found < 2.0).all())


def test_the_condition_of_scaled_dependent_and_absent_rows() -> None:
    J = matrices.conditioned(8, 50, 60.0)
    plain = condition(J @ J.T, J.norm(dim=1), TOL)

    def of(rows: Tensor) -> float:
        return float(condition(rows @ rows.T, rows.norm(dim=1), TOL))

    assert of(matrices.scaled(J, 6)) == pytest.approx(float(plain), rel=1e-6)
    assert of(torch.cat([J, 0 * J[:2]])) == pytest.approx(float(plain), rel=1e-12)
    assert of(torch.cat([J, -3 * J[:2]])) == float("inf")
    assert of(0 * J) == 0.0 and of(J[:0]) == 0.0
    # Errors that are relative to other lengths than the rows' own grow by the ratio.
    assert float(condition(J @ J.T, 10 * J.norm(dim=1), TOL)) == pytest.approx(
        float(plain), rel=1e-12
    )
