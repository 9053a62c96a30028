"""DualProj: the nearest direction to the mean row that conflicts with no row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast._ops._host_linalg import Array
from mtu_fast.methods import _pivoting, _programs
from mtu_fast.methods._arguments import check_gram
from mtu_fast.methods._gram import unit_rows
from mtu_fast.methods._host import LiveRows, solved
from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import Roles, equal_shares


@dataclass(frozen=True)
class DualProj(Method):
    """w = argmin ½ vᵀG v over v ≥ u, u = 1/T: J^T w is the projection of the mean row on {d: ⟨g_i, d⟩ ≥ 0 for all i}.

    Where the mean conflicts with no row, w = u. Forget rows enter negated and their weights come
    back negated; subspace rows take no part; T counts the rows that do. A zero row conflicts with
    none. J^T w is unique; w is where rows are independent. Meant for one mean row per (kind, task).
    On a GPU it runs there without waiting for it.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv
    1706.08840, section 3 (its quadratic program, with the mean row as what is projected); named as
    here in Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232.
    """

    per = "task"

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("DualProj", G, roles)
        return solved(G, roles, _on_host, lambda G: _on_device(G, roles))

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1/T on retain rows, -1/T on forget rows, [R]: the weights where nothing conflicts."""
        return equal_shares(roles)


def _on_host(rows: LiveRows) -> Array | None:
    return _pivoting.project(rows, rows.share)


def _on_device(G: Tensor, roles: Roles) -> Tensor:
    u = equal_shares(roles)
    # forget rows are negated to solve, and their weights negated back
    share = u.abs().expand(G.shape[:-1])
    return u.sign() * _programs.project(unit_rows(G, u.sign()), share)
