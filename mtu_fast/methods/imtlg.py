"""IMTL-G: a direction whose projections on all rows are equal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtu_fast._ops._host_linalg import Array, eigh, solve
from mtu_fast.methods._arguments import check_gram
from mtu_fast.methods._gram import unit_rows
from mtu_fast.methods._host import LiveRows, solved
from mtu_fast.methods.base import Method, dependence_tolerance
from mtu_fast.methods.roles import Roles, signs


@dataclass(frozen=True)
class IMTLG(Method):
    """w = v / Σv with v = G⁺ √diag(G): J^T w has the same projection on the direction of every row.

    Weights may be negative; they sum to 1 before the forget rows' are turned back. Forget rows
    enter negated and their weights come back negated; subspace and zero rows take no part. Our
    reading where G is singular: the pseudo-inverse is that of the equilibrated C = D G D, v = D C⁺
    1, with singular values of the unit rows below the dependence tolerance counted as zero, so that
    the scale of a loss decides nothing. TorchJD inverts G itself; the two agree where G is regular.
    Where Σv vanishes (opposite rows) there is no such direction, and w = 0. Meant for one mean row
    per (kind, task). `torch.linalg.eigh` looks at its own status once per call, which is the one wait
    for a GPU.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, equation 6.
    """

    per = "task"

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("IMTLG", G, roles)
        tol = dependence_tolerance(roles.dtype)
        return solved(G, roles, lambda rows: _on_host(rows, tol), lambda G: _any(G, roles, tol))

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1 on retain rows, -1 on forget rows, [R]: each loss by itself."""
        return signs(roles)


def _on_host(rows: LiveRows, tol: float) -> Array:
    """The weights [R] of signed rows, one matrix on the CPU."""
    w = np.zeros(rows.live.shape)
    if not len(rows.length):
        return w
    # equal projections on unit rows: C u = 1, and w = u / length
    v = _equal(rows, tol) / rows.length
    total = v.sum()
    # a sum that is rounding of larger terms counts as none
    size = max(np.abs(v).sum(), 1.0 / rows.length.min())
    if abs(total) > tol * size:
        w[rows.live] = v / total
    return w


def _equal(rows: LiveRows, tol: float) -> Array:
    """C⁺ 1 [n] of the unit rows."""
    if not rows.dependent:
        return solve(rows.E, np.ones(len(rows.E)))
    # C⁺ = V Λ⁺ Vᵀ, and Vᵀ 1 is the sum of the columns
    values, V = eigh(rows.E)
    counts = values > tol**2 * values[-1]
    inverse = np.zeros_like(values)
    inverse[counts] = 1.0 / values[counts]
    return V @ (inverse * V.sum(0))


def _any(G: Tensor, roles: Roles, tol: float) -> Tensor:
    """The weights [..., R] on any device, of any rows."""
    sign = signs(roles)
    rows = unit_rows(G, sign)
    values, V = torch.linalg.eigh(rows.E)  # [..., R], [..., R, R]
    inverse = torch.where(values > tol**2 * values[..., -1:], 1.0 / values, 0.0)
    # V.sum(-2) is Vᵀ 1
    u = (V * (inverse * V.sum(-2))[..., None, :]).sum(-1)  # V Λ⁺ Vᵀ 1
    D = torch.where(rows.live, 1.0 / rows.length, 0.0)
    v = D * u
    total = v.sum(-1, keepdim=True)
    size = torch.maximum(v.abs().sum(-1, keepdim=True), D.amax(-1, keepdim=True))
    return torch.where(total.abs() <= tol * size, 0.0, sign * v / total)
