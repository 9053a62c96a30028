"""UPGrad: each row's nearest direction that conflicts with no row, averaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast._ops._host_linalg import Array
from mtu_fast.methods import _pivoting, _programs
from mtu_fast.methods._arguments import check_gram
from mtu_fast.methods._gram import UnitRows, unit_rows
from mtu_fast.methods._host import LiveRows, solved
from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import Roles, equal_shares


@dataclass(frozen=True)
class UPGrad(Method):
    """w = Σ_i argmin ½ vᵀG v over v ≥ u_i, u_i = e_i / T: the mean of the rows, each projected on {d: J d ≥ 0}.

    Where no rows conflict, w = 1/T. Forget rows enter negated and their weights come back negated;
    subspace rows take no part; T counts the rows that do. A zero row conflicts with none. J^T w is
    unique; w is where rows are independent. Meant for one mean row per (kind, task). R problems of
    R rows at once, in memory of R³; on a GPU without waiting for it.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232,
    proposition 1.
    """

    per = "task"

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("UPGrad", G, roles)
        return solved(G, roles, _on_host, lambda G: _on_device(G, roles))

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1/T on retain rows, -1/T on forget rows, [R]: the weights where nothing conflicts."""
        return equal_shares(roles)


def _on_host(rows: LiveRows) -> Array | None:
    return _pivoting.project_each(rows, rows.share)


def _on_device(G: Tensor, roles: Roles) -> Tensor:
    u = equal_shares(roles)
    rows = unit_rows(G, u.sign())
    # R problems over the same rows, as one batch
    each = UnitRows(
        rows.E[..., None, :, :],
        rows.length[..., None, :],
        rows.live[..., None, :],
        rows.zero[..., None, :],
    )
    share = torch.diag_embed(u.abs()).expand(G.shape)
    return u.sign() * _programs.project(each, share).sum(-2)
