"""IMTL-G: a direction whose projections on all rows are equal."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast.methods.base import Roles, check_gram, dependence_tolerance
from mtu_fast.methods.signed import equilibrated, signed_gram, signs


class IMTLG:
    """w = v / Σv with v = G⁺ √diag(G): J^T w has the same projection on the direction of every row.

    Weights may be negative; they sum to 1 before the forget rows' are turned back. Forget rows
    enter negated and their weights come back negated; subspace and zero rows take no part. Our
    reading where G is singular: the pseudo-inverse is that of the equilibrated C = D G D, v = D C⁺
    1, with singular values of the unit rows below the dependence tolerance counted as zero, so that
    the scale of a loss decides nothing. TorchJD inverts G itself; the two agree where G is regular.
    Where Σv vanishes (opposite rows) there is no such direction, and w = 0. Meant for one mean row
    per (kind, task). `torch.linalg.eigh` looks at its own status once a call, which is the one wait
    for a GPU.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, equation 6.
    """

    per = "task"
    granularity = "global"
    needs_gram = True

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        if not len(roles):
            return check_gram("IMTLG", G, roles).diagonal(dim1=-2, dim2=-1)
        G, sign = signed_gram("IMTLG", G, roles)
        tol = dependence_tolerance(roles.dtype)
        C, D = equilibrated(G)
        values, V = torch.linalg.eigh(C)  # [..., R], [..., R, R]
        inverse = torch.where(
            values > tol**2 * values[..., -1:], 1.0 / values, torch.zeros_like(values)
        )
        u = (V * (inverse * V.sum(-2))[..., None, :]).sum(-1)  # V Λ⁺ Vᵀ 1
        v = D * u
        total = v.sum(-1, keepdim=True)
        vanishing = total.abs() <= tol * torch.maximum(
            v.abs().sum(-1, keepdim=True), D.amax(-1, keepdim=True)
        )
        return torch.where(vanishing, torch.zeros_like(v), sign * v / total)

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1 on retain rows, -1 on forget rows, [R]: each loss by itself."""
        return signs(roles)

    def __repr__(self) -> str:
        return "IMTLG()"
