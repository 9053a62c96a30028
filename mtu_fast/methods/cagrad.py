"""CAGrad: the direction near the mean row that is best for the row it serves worst."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast._arguments import check_positive
from mtu_fast._ops._host_linalg import Array
from mtu_fast.methods import _ball, _pivoting
from mtu_fast.methods._arguments import check_gram
from mtu_fast.methods._gram import unit_rows
from mtu_fast.methods._host import LiveRows, solved
from mtu_fast.methods.base import Method, dependence_tolerance
from mtu_fast.methods.roles import Roles, equal_shares


@dataclass(frozen=True)
class CAGrad(Method):
    """w = 1/T + c ‖g_0‖ / ‖J^T p‖ · p with p = argmin pᵀG 1/T + c ‖g_0‖ √(pᵀG p) over the simplex, g_0 = J^T 1/T.

    That is d = argmax min_i ⟨g_i, d⟩ over ‖d - g_0‖ ≤ c ‖g_0‖; c = 0 is the mean. Where the hull of
    the rows contains 0 no direction serves all, and several may conflict with none: d is then the
    nearest of them to g_0, `DualProj`'s, if the ball holds it (our reading; the paper's formula
    divides by 0). A zero row is such a case. Forget rows enter negated and their weights come back
    negated; subspace rows take no part; T counts the rows that do. The result is not rescaled by 1
    + c or 1 + c². Meant for one mean row per (kind, task). On a GPU it runs there without
    waiting for it.

    Args:
        c: radius of the ball in units of ‖g_0‖, at least 0; the paper's proof for the mean loss
            holds for c < 1.

    Raises:
        TypeError: `c` is not a number.
        ValueError: `c` is negative or not finite.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", arXiv
    2110.14048, algorithm 1.
    """

    c: float = 0.5
    per = "task"

    def __post_init__(self) -> None:
        check_positive("CAGrad: c", self.c, zero=True)  # 0 is the mean row

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor, or rows of a dtype without a tolerance, is a TypeError; a
        `G` whose size is not the number of rows in `roles` a ValueError.
        """
        G = check_gram("CAGrad", G, roles)
        tol = dependence_tolerance(roles.dtype)

        def on_host(rows: LiveRows) -> Array | None:
            return _pivoting.best_worst(rows, self.c, tol)

        def on_device(G: Tensor) -> Tensor:
            u = equal_shares(roles)
            # forget rows are negated to solve, and their weights negated back
            rows = unit_rows(G, u.sign())
            return u.sign() * (u.abs() + _ball.push(rows, u.abs(), self.c, tol))

        return solved(G, roles, on_host, on_device)

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1/T on retain rows, -1/T on forget rows, [R]: the mean from which the direction departs."""
        return equal_shares(roles)
