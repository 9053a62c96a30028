"""DualProj: the nearest direction to the mean row that conflicts with no row."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.methods._programs import equilibrate, preference, project
from mtu_fast.methods.base import Roles, check_gram


class DualProj:
    """w = argmin ½ vᵀG v over v ≥ u, u = 1/T: J^T w is the projection of the mean row on {d: ⟨g_i, d⟩ ≥ 0 for all i}.

    Where the mean conflicts with no row, w = u. Forget rows enter negated and their weights come
    back negated; subspace rows take no part; T counts the rows that do. A zero row conflicts with
    none. J^T w is unique; w is where rows are independent. Meant for one mean row per (kind, task).
    Runs on the device of G without waiting for it.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv
    1706.08840, section 3 (its quadratic program, with the mean row as what is projected); named as
    here in Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232.
    """

    per = "task"
    granularity = "global"
    needs_gram = True

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("DualProj", G, roles)
        if not len(roles):
            return G.new_zeros(G.shape[:-1])
        u = preference(roles)
        return u.sign() * project(equilibrate(G, roles), u.abs().expand(G.shape[:-1]))

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1/T on retain rows, -1/T on forget rows, [R]: the weights where nothing conflicts."""
        return preference(roles)

    def __repr__(self) -> str:
        return "DualProj()"
