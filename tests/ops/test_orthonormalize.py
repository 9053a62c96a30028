"""Tall Gram-Schmidt and the ops it is made of, against orthonormality, the span of the rows and float64 truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtu_fast._ops import _library
from mtu_fast._ops.gram_schmidt import TOLERANCE, basis, orthonormalize, transform
from tests.helpers import matrices
from tests.helpers.tolerance import assert_as_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOL = TOLERANCE[torch.float64]
CONDITIONS = [1.0, 1e2, 1e4, 1e6]
Basis = Callable[[Tensor, float], tuple[Tensor, Tensor]]


@pytest.fixture(params=["dispatched", "reference"])
def run(request: pytest.FixtureRequest) -> Basis:
    return basis if request.param == "dispatched" else basis.reference


def departure(Q: Tensor, kept: Tensor) -> float:
    """The spectral norm of `Q Qᵀ - diag(kept)`."""
    wide = Q.double()
    return float(
        torch.linalg.matrix_norm(wide @ wide.mT - torch.diag_embed(kept.double()), 2).max()
    )


def outside(J: Tensor, Q: Tensor) -> float:
    """The largest part of a row of J, relative to the row, that is not in the span of Q."""
    wide, span = J.double(), torch.linalg.qr(Q.double().T).Q
    left = wide - wide @ span @ span.T
    return float((left.norm(dim=1) / wide.norm(dim=1).clamp(min=1e-300)).max())


# ---- tall ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cond", CONDITIONS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_orthonormal_and_of_the_same_span(dtype: torch.dtype, bound: float, cond: float) -> None:
    J = matrices.conditioned(32, 3_000, cond).to(dtype)
    Q, kept = orthonormalize(J)
    assert kept.all() and Q.dtype == dtype and Q.shape == J.shape
    assert departure(Q, kept) <= bound
    assert outside(J, Q) <= 32 * torch.finfo(dtype).eps
    truth = torch.linalg.svd(J.double(), full_matrices=False).Vh
    span = torch.linalg.qr(Q.double().T).Q.T
    # the sine of the largest angle
    gap = torch.linalg.matrix_norm(span - span @ truth.T @ truth, 2)
    assert gap <= 16 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float64).eps * cond


@pytest.mark.parametrize("cond", CONDITIONS)
def test_as_orthonormal_as_householder(cond: float) -> None:
    J = matrices.conditioned(24, 500, cond).float()
    Q, kept = orthonormalize(J)
    plain = torch.linalg.qr(J.T).Q.T
    eye = torch.eye(24, dtype=torch.float64)
    assert_as_accurate(f"cond {cond:g}", Q.double() @ Q.double().T, (plain @ plain.T), eye)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_what_rounding_leaves(dtype: torch.dtype) -> None:
    """Rows of half precision cannot be more orthonormal than an orthonormal basis that is rounded to it."""
    J = matrices.conditioned(16, 2_000, 10.0).to(dtype)
    Q, kept = orthonormalize(J)
    assert kept.all()
    exact = torch.linalg.qr(J.double().T).Q.T
    assert departure(Q, kept) <= 2 * departure(exact.to(dtype), kept) + torch.finfo(dtype).eps
    assert outside(J, Q) <= torch.finfo(dtype).eps


ROW_SETS = {
    "duplicated rows": (matrices.with_duplicates(matrices.conditioned(8, 30, 6e2)), 8),
    "a zero row": (matrices.with_zero_row(matrices.conditioned(9, 30, 6.0), 4), 8),
    "only zero rows": (torch.zeros(4, 7, dtype=torch.float64), 0),
    "low rank": (matrices.low_rank(20, 40, 7), 7),
    "more rows than parameters": (matrices.conditioned(20, 6, 6.0), 6),
    "lengths over twelve decades": (matrices.scaled(matrices.conditioned(12, 40, 6.0), 12), 12),
    "one row": (matrices.conditioned(1, 5, 1.0), 1),
    "as many rows as are promised": (matrices.low_rank(512, 300, 200), 200),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ROW_SETS)
def test_dependent_rows_are_dropped(name: str, dtype: torch.dtype) -> None:
    J, rank = ROW_SETS[name][0].to(dtype), ROW_SETS[name][1]
    Q, kept = orthonormalize(J)
    assert kept.dtype == torch.bool and kept.sum() == rank
    assert (Q[~kept] == 0).all()
    assert departure(Q, kept) <= (1e-6 if dtype == torch.float32 else 1e-13)
    if rank:
        assert outside(J, Q[kept]) <= (1e-5 if dtype == torch.float32 else 1e-12)


def test_a_list_is_one_set_of_rows() -> None:
    J = [torch.randn(5, 3, 4), torch.randn(5), torch.randn(5, 0, 2), torch.randn(5, 2, 2, 2, 2)]
    Q, kept = orthonormalize(J)
    joined, kept_joined = orthonormalize(
        torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in J], 1)
    )
    assert torch.equal(kept, kept_joined)
    assert [q.shape for q in Q] == [t.shape for t in J]
    flat = torch.cat([q.reshape(5, -1) for q in Q], 1)
    torch.testing.assert_close(flat.T @ flat, joined.T @ joined, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [40, 70_000])
def test_a_batch_is_each_on_its_own(width: int) -> None:
    J = torch.randn(3, 6, width)
    J[1, 4] = J[1, 2]
    Q, kept = orthonormalize(J)
    assert kept.sum(-1).tolist() == [6, 5, 6]
    for i in range(3):
        one, kept_one = orthonormalize(J[i])
        # rows of one length: the order of pivots is as rounding has it
        assert kept[i].sum() == kept_one.sum()
        assert departure(Q[i], kept[i]) <= 1e-6
        assert outside(J[i], one[kept_one]) <= 1e-6 and outside(J[i], Q[i][kept[i]]) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    Q, kept = orthonormalize(torch.zeros(shape))
    assert Q.shape == shape and kept.shape == shape[:-1] and not kept.any()


def test_no_parameters() -> None:
    Q, kept = orthonormalize([])
    assert Q == [] and kept.shape == (0,)


def test_views_are_read_and_left_alone() -> None:
    J = torch.randn(4, 60)
    for view in (J.T.contiguous().T, J.repeat(1, 2)[:, :60], torch.stack([J, J], 2)[..., 0]):
        copy = view.clone()
        assert torch.equal(orthonormalize(view)[0], orthonormalize(J)[0])
        assert torch.equal(view, copy)
    Q, kept = orthonormalize(J[:1].expand(3, 60))
    assert kept.sum() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    J = torch.randn(2, 4, 9)
    J[0, 2, 5] = value
    Q, kept = orthonormalize(J)
    assert Q[0].isnan().all() and kept.all()
    assert Q[1].isfinite().all()


def test_carries_no_gradient() -> None:
    assert not orthonormalize(torch.randn(3, 40, requires_grad=True))[0].requires_grad


def test_twice_the_same_bits() -> None:
    J = torch.randn(6, 50_001)
    assert torch.equal(orthonormalize(J)[0], orthonormalize(J)[0])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.ones(2, 3).int(), TypeError, r"rows is torch\.int32"),
        ([1, 2], TypeError, r"rows\[0\] is int, expected a tensor"),
        (torch.ones(3), ValueError, r"rows has shape \[3\], expected \[K, P\]"),
        (torch.ones(2, 3, 4, 5), ValueError, "pass a list"),
        ([torch.ones(2, 3), torch.ones(2, 3).double()], TypeError, r"rows\[1\] is torch\.float64"),
        ([torch.ones(2, 3), torch.ones(3, 3)], ValueError, "the same K rows"),
        ([torch.ones(())], ValueError, "is a scalar"),
        ([torch.ones(2, 3), torch.ones(2, 3, device="meta")], ValueError, r"rows\[1\] is on meta"),
    ],
)
def test_errors_teach(rows: Tensor | list[Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        orthonormalize(rows)


def test_the_tolerance_is_a_length() -> None:
    with pytest.raises(ValueError, match=r"tol is 0\.0"):
        orthonormalize(torch.ones(2, 3), tol=0.0)
    J = torch.eye(2, 3)
    J[1, 0] = 1.0
    assert orthonormalize(J, tol=0.5)[1].sum() == 2
    assert orthonormalize(J, tol=0.9)[1].sum() == 1


# ---- basis ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in ROW_SETS if name != "as many rows as are promised"]
)
def test_basis_turns_the_gram_into_the_identity(run: Basis, name: str) -> None:
    J, rank = ROW_SETS[name]
    T, kept = run(J @ J.T, TOL)
    assert kept.sum() == rank
    assert (T[~kept] == 0).all() and (T[:, ~kept] == 0).all()
    assert departure(T @ J, kept) <= 1e-8


@pytest.mark.parametrize("R", [1, 2, 3, 4, 5, 31, 32, 33, 130])
def test_basis_of_a_batch_as_the_reference(R: int) -> None:
    J = torch.stack([matrices.conditioned(R, R + 9, 50.0, seed) for seed in range(2)])
    G = J @ J.mT
    T, kept = basis(G, TOL)
    plain, plain_kept = basis.reference(G, TOL)
    assert kept.all() and plain_kept.all()
    assert_as_accurate(
        f"R={R}", T @ G @ T.mT, plain @ G @ plain.mT, torch.eye(R).double().expand(2, R, R)
    )
    order = (T != 0).sum(-1).argsort(-1)  # row i combines those pivoted before it
    for t, o in zip(T, order, strict=True):
        assert (t[o][:, o].triu(1) == 0).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2), (2, 0, 4)])
def test_basis_empty(run: Basis, shape: tuple[int, ...]) -> None:
    T, kept = run(torch.zeros(*shape, shape[-1]).double(), TOL)
    assert T.shape == (*shape, shape[-1]) and kept.shape == shape


@pytest.mark.parametrize("where", [(1, 1), (0, 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_basis_shows_what_is_not_finite(run: Basis, where: tuple[int, int], value: float) -> None:
    J = matrices.conditioned(4, 9, 6.0)
    G = (J @ J.T).expand(2, 4, 4).clone()
    for i, j in (where, where[::-1]):
        G[0, i, j] = value
    T, kept = run(G, TOL)
    assert not T[0].isfinite().all() and kept.all()
    assert T[1].isfinite().all()


@pytest.mark.parametrize("shape", [(6,), (2, 5), (0,)])
def test_basis_opcheck(shape: tuple[int, ...]) -> None:
    J = torch.randn(*shape, 9, dtype=torch.float64)
    torch.library.opcheck(basis.overload, (J @ J.mT, TOL))


# ---- transform -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 4, 33])
def test_transform_errs_at_most_twice_what_plain_torch_errs(dtype: torch.dtype, k: int) -> None:
    rows = [torch.randn(k, p).to(dtype) for p in (1, 1_000, 5_003)]
    T = torch.randn(k, k, dtype=torch.float64)
    for found, t in zip(transform(rows, T), rows, strict=True):
        assert found.dtype == dtype
        assert_as_accurate(f"{dtype}, {k} x {t.shape[1]}", found, T.to(dtype) @ t, T @ t.double())


@pytest.mark.parametrize(
    "shape", [(3, 5, 40), (2, 1, 9), (0, 3, 5), (2, 0, 5), (2, 3, 0), (50, 6, 300), (4, 0), (4, 1)]
)
def test_transform_every_shape(shape: tuple[int, ...]) -> None:
    rows, T = (
        torch.randint(-4, 5, shape).float(),
        torch.randint(-4, 5, (*shape[:-1], shape[-2])).double(),
    )
    for implementation in (transform, transform.reference):
        (found,) = implementation([rows], T)
        assert torch.equal(found.double(), T @ rows.double())
        (strided,) = implementation([rows.mT.contiguous().mT], T)
        assert torch.equal(strided, found)


def test_transform_opcheck() -> None:
    rows = [torch.randn(3, 5), torch.randn(3, 6).half()]
    torch.library.opcheck(transform.overload, (rows, torch.randn(3, 3).double()))
    torch.library.opcheck(
        transform.overload, ([torch.randn(2, 3, 5)], torch.randn(2, 3, 3).double())
    )


built = pytest.mark.skipif(_library.EXTENSION is None, reason=_library.MISSING or "built")


@built
def test_the_kernels_are_what_runs() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        orthonormalize(torch.randn(4, 60))
    names = {event.key for event in profile.key_averages()}
    assert {"mtu_fast::row_gram", "mtu_fast::basis", "mtu_fast::transform"} <= names
    # what the references are made of
    assert not names & {"aten::gather", "aten::matmul", "aten::addmm_"}


@built
def test_the_same_bits_whatever_the_threads() -> None:
    J, small = torch.randn(7, 100_003), torch.randn(300, 12, 40)
    expected = orthonormalize(J)[0], orthonormalize(small)[0]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(orthonormalize(J)[0], expected[0])
            assert torch.equal(orthonormalize(small)[0], expected[1])
    finally:
        torch.set_num_threads(threads)


@built
@pytest.mark.parametrize(
    ("rows", "T", "message"),
    [
        (torch.ones(3, 5), torch.eye(3), "float64 T"),
        (torch.ones(3, 5), torch.eye(4).double(), "to go with T"),
        (torch.ones(2, 3, 5), torch.eye(3).double(), "to go with T"),
        (torch.ones(3, 5), torch.ones(3, 4).double(), r"T \[K, K\]"),
        (torch.ones(3, 5).int(), torch.eye(3).double(), "expected float64, float32"),
    ],
)
def test_transform_checks_its_own_arguments(rows: Tensor, T: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        transform.overload([rows], T)


@built
def test_basis_checks_its_own_arguments() -> None:
    with pytest.raises(RuntimeError, match="float64"):
        basis.overload(torch.eye(3), TOL)
    with pytest.raises(RuntimeError, match="square"):
        basis.overload(torch.zeros(3, 4).double(), TOL)
