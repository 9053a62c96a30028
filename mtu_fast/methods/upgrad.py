"""UPGrad: each row's nearest direction that conflicts with no row, averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast.methods._programs import UnitRows, equilibrate, preference, project
from mtu_fast.methods.base import Roles, check_gram


class UPGrad:
    """w = Σ_i argmin ½ vᵀG v over v ≥ u_i, u_i = e_i / T: the mean of the rows, each projected on {d: J d ≥ 0}.

    Where no rows conflict, w = 1/T. Forget rows enter negated and their weights come back negated;
    subspace rows take no part; T counts the rows that do. A zero row conflicts with none. J^T w is
    unique; w is where rows are independent. Meant for one mean row per (kind, task). Runs on the
    device of G without waiting for it: R problems of R rows at once, in memory of R³.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232,
    proposition 1.
    """

    per = "task"
    granularity = "global"
    needs_gram = True

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("UPGrad", G, roles)
        if not len(roles):
            return G.new_zeros(G.shape[:-1])
        u = preference(roles)
        rows = equilibrate(G, roles)
        each = UnitRows(
            rows.E[..., None, :, :], rows.length[..., None, :], rows.live[..., None, :], rows.zero
        )
        return u.sign() * project(each, torch.diag_embed(u.abs()).expand(G.shape)).sum(-2)

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1/T on retain rows, -1/T on forget rows, [R]: the weights where nothing conflicts."""
        return preference(roles)

    def __repr__(self) -> str:
        return "UPGrad()"
