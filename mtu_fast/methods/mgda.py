"""MGDA: the point of least norm in the convex hull of the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.methods import _pivoting, _programs
from mtu_fast.methods._arguments import check_gram
from mtu_fast.methods._gram import unit_rows
from mtu_fast.methods._host import solved
from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import Roles, equal_shares, signs


@dataclass(frozen=True)
class MGDA(Method):
    """w = argmin wᵀG w over w ≥ 0, Σ w = 1; for two rows w_1 = (g_22 - g_12) / (g_11 + g_22 - 2 g_12), cut to [0, 1].

    J^T w serves every row, ⟨g_i, J^T w⟩ ≥ ‖J^T w‖², or is 0 where no direction does. Short rows
    rule: a row that tends to 0 takes all the weight and the direction with it; zero rows share the
    weight equally. Forget rows enter negated and their weights come back negated; subspace rows
    take no part. J^T w is unique; w is where rows are independent. Meant for one mean row per
    (kind, task). On a GPU it runs there without waiting for it.

    Source: Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
    2012; Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", arXiv 1810.04650,
    section 3.
    """

    per = "task"

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("MGDA", G, roles)
        return solved(G, roles, _pivoting.least_norm, lambda G: _on_device(G, roles))

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1/T on retain rows, -1/T on forget rows, [R]: MGDA's where rows are orthogonal and equally long."""
        return equal_shares(roles)


def _on_device(G: Tensor, roles: Roles) -> Tensor:
    sign = signs(roles)
    rows = unit_rows(G, sign)
    # x weighs unit rows; a x weighs the rows, and sums to 1
    x, a = _programs.least_norm(rows)
    zero = rows.zero.double()
    count = zero.sum(-1, keepdim=True)
    shared = zero / count.clamp(min=1.0)
    return sign * torch.where(count > 0, shared, a * x)
