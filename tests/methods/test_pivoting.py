"""One matrix on the CPU: exchanges and Newton's steps find what the batched iterations find, or leave it to them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mtu_fast import reference
from mtu_fast.methods import (
    FORGET,
    IMTLG,
    MGDA,
    RETAIN,
    SUBSPACE,
    CAGrad,
    DualProj,
    FairGrad,
    Method,
    NashMTL,
    UPGrad,
    _host,
    _pivoting,
)  # fmt: skip
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of
from tests.helpers.truth import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS: list[Method] = [
    DualProj(), UPGrad(), MGDA(), CAGrad(0.2), CAGrad(0.9), NashMTL(), FairGrad(0.5), FairGrad(2.0), IMTLG(),
]  # fmt: skip
LIVE_ROWS = _host.live_rows
every = pytest.mark.parametrize("method", METHODS, ids=repr)


def rows_of(R: int, pull: float, decades: float, seed: int) -> Tensor:
    """Rows that conflict more the more they are pulled apart, of lengths up to so many decades apart."""
    J = matrices.pulled_apart(R, 3 * R, pull, seed)
    exponent = torch.rand(R, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return J * 10 ** (-decades * exponent)


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have nothing solved one by one from then on."""
    return lambda: monkeypatch.setattr(_host, "live_rows", lambda G, sign: None)


def independent_only(G: _host.Array, sign: _host.Array) -> _host.LiveRows | None:
    """`_host.live_rows`, with None where they are dependent."""
    rows = LIVE_ROWS(G, sign)
    return None if rows is None or rows.dependent else rows


@every
@pytest.mark.parametrize("R", [1, 2, 5, 16])
@pytest.mark.parametrize(("pull", "decades"), [(0.0, 0.0), (0.9, 0.0), (0.9, 2.0)])
def test_one_by_one_is_the_batched_iteration(
    method: Method, R: int, pull: float, decades: float, batched: Callable[[], None]
) -> None:
    J = rows_of(R, pull, decades, seed=R)
    kinds = [RETAIN if i % 3 else FORGET for i in range(R)]
    found = method(J @ J.t(), roles(kinds))
    batched()
    assert relative_error(J.t() @ found, J.t() @ method(J @ J.t(), roles(kinds))) <= 1e-8


@every
@pytest.mark.parametrize("seed", range(5))
def test_independent_rows_are_left_to_no_iteration(
    method: Method, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above compares are two computations."""
    J = rows_of(6, 0.9, 1.0, seed)

    def refused(*_: object) -> Tensor:
        raise AssertionError("left to the iteration")

    monkeypatch.setattr("mtu_fast.methods._programs.complementary", refused)
    monkeypatch.setattr("mtu_fast.methods._bargaining._iterated", refused)
    monkeypatch.setattr("mtu_fast.methods.imtlg._any", refused)
    assert method(J @ J.t(), roles_of(6, 0)).isfinite().all()


@pytest.mark.parametrize("seed", range(20))  # each size with each spread of lengths
def test_cagrad_is_the_bisection_of_the_reference(seed: int) -> None:
    """At row lengths decades apart, too, where an interior point jams on rare problems."""
    J = rows_of(2 + seed % 4, 0.3 * (seed % 4), float(seed % 5), seed)
    for c in (0.1, 0.5, 1.0, 2.0):
        found = J.t() @ CAGrad(c)(J @ J.t(), roles_of(len(J), 0))
        truth = reference.cagrad(J, c)
        assert (J @ found).min() >= (J @ truth).min() - 1e-9 * J.norm() ** 2
        assert (found - truth).norm() <= 1e-6 * truth.norm()


def test_what_does_not_end_is_left_to_the_batched_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    J = rows_of(6, 0.9, 0.0, 0)
    found = {method: method(J @ J.t(), roles_of(6, 0)) for method in METHODS[:5]}
    calls = []

    def refused(M: _host.Array, q: _host.Array, dependent: bool) -> None:
        calls.append(len(q))

    monkeypatch.setattr(_pivoting, "several", refused)
    for method, weights in found.items():
        assert relative_error(method(J @ J.t(), roles_of(6, 0)), weights) <= 1e-9
    assert len(calls) == len(found)


@pytest.mark.parametrize(
    ("J", "dependent"),
    [
        (matrices.pulled_apart(4, 9), False),
        (matrices.with_duplicates(matrices.pulled_apart(4, 9), times=2), True),
        (matrices.low_rank(6, 20, rank=3), True),
    ],
    ids=["independent", "duplicates", "low rank"],
)
def test_dependent_rows_are_told_apart(J: Tensor, dependent: bool) -> None:
    rows = _host.live_rows((J @ J.t()).numpy(), np.ones(len(J)))
    assert rows is not None and rows.dependent is dependent


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_left_to_the_iteration(value: float) -> None:
    J = torch.tensor([[value, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert _host.live_rows((J @ J.t()).numpy(), np.ones(2)) is None


@every
def test_some_matrices_of_a_batch_are_left_to_the_iteration(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [rows_of(5, 0.5, 0.0, seed) for seed in range(3)]
    sets.insert(1, sets[0][[0, 0, 1, 2, 3]])
    monkeypatch.setattr(_host, "live_rows", independent_only)
    G = torch.stack([J @ J.t() for J in sets])
    for J, g, w in zip(sets, G, method(G, roles_of(4, 1)), strict=True):
        assert relative_error(J.t() @ w, J.t() @ method(g, roles_of(4, 1))) <= 1e-10


@every
def test_rows_of_a_subspace_and_zero_rows_are_not_in_the_matrix(method: Method) -> None:
    J = matrices.with_zero_row(rows_of(6, 0.5, 0.0, 3), at=2)
    rows = _host.live_rows((J @ J.t()).numpy(), np.array([1.0, -1.0, 1.0, 1.0, 0.0, 1.0]))
    assert rows is not None and len(rows.E) == 4
    assert rows.zero.tolist() == [False, False, True, False, False, False]
    w = method(J @ J.t(), roles([RETAIN, FORGET, RETAIN, RETAIN, SUBSPACE, RETAIN]))
    assert w[4] == 0 and w.isfinite().all()
