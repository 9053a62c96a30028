"""One matrix on the CPU: solved as numpy does, and by torch's threads alone where numpy would wake its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mtu_fast as mtu
from mtu_fast._ops import _host_linalg as linalg
from tests.helpers.truth import relative_error

MANY = linalg.ALONE + 8
METHODS = [
    mtu.OrthoGrad(0.5),
    mtu.UPGrad(),
    mtu.DualProj(),
    mtu.MGDA(),
    mtu.CAGrad(),
    mtu.IMTLG(),
    mtu.NashMTL(),
    mtu.FairGrad(),
    mtu.AlignedMTL(),
]


def positive(n: int) -> linalg.Array:
    J = np.random.default_rng(n).standard_normal((n, n + 5))
    return np.asarray(J @ J.T / n + np.eye(n))


@pytest.mark.parametrize("n", [1, 5, linalg.ALONE, MANY])
def test_they_are_those_of_numpy(n: int) -> None:
    A, b = positive(n), np.arange(1.0, n + 1)
    factor, failed = linalg.cholesky(A)
    assert not failed and np.allclose(factor @ factor.T, A, rtol=1e-12, atol=0)
    assert np.allclose(linalg.solve(A, b), np.linalg.solve(A, b), rtol=1e-10)
    several = np.stack([A, 2 * A, positive(n + 1)[:n, :n]])
    x = linalg.solve(several, np.stack([b, b, -b]))
    assert np.allclose(x[1], linalg.solve(A, b) / 2, rtol=1e-10)
    assert np.allclose(several[2] @ x[2], -b, rtol=1e-10)
    assert np.allclose(linalg.inv(A) @ b, linalg.solve(A, b), rtol=1e-9)
    values, vectors = linalg.eigh(A)
    assert np.allclose(vectors * values @ vectors.T, A, rtol=1e-12, atol=1e-12)
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize("n", [3, MANY])
def test_what_has_no_factor_or_solution_is_told(n: int) -> None:
    assert linalg.cholesky(-positive(n))[1]
    with pytest.raises(np.linalg.LinAlgError):
        linalg.solve(np.zeros((n, n)), np.ones(n))
    with pytest.raises(np.linalg.LinAlgError):
        linalg.inv(np.zeros((n, n)))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_step_of_many_rows_wakes_no_threads_of_numpy(
    method: mtu.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They spin on after the call, and the next forward takes twice as long."""

    def small(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(A: linalg.Array, *args: Any) -> Any:
            assert A.shape[-1] <= linalg.ALONE, f"numpy.linalg.{name} of {A.shape}"
            return function(A, *args)

        return checked

    for name in ("cholesky", "solve", "eigh", "inv", "qr", "svd"):
        monkeypatch.setattr(np.linalg, name, small(name, getattr(np.linalg, name)))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 12), nn.Tanh(), nn.Linear(12, 3))
    engine, forget, found = mtu.Engine(net), torch.arange(MANY) < 4, []
    for _ in range(2):
        rows = engine.rows(net(torch.randn(MANY, 30)).square().sum(1), forget=forget)
        found.append(rows.backward(method, check=False).weights)
    assert relative_error(found[0], found[1]) > 1e-6  # other data, other weights
    assert all(w.isfinite().all() for w in found)
