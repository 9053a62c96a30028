"""Nash-MTL: the bargaining solution between the rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.methods._arguments import check_gram
from mtu_fast.methods._bargaining import fair_weights
from mtu_fast.methods.base import Method, dependence_tolerance
from mtu_fast.methods.roles import Roles, signs


@dataclass(frozen=True)
class NashMTL(Method):
    """G w = 1 / w, w > 0: the w that maximises Π_i <g_i, J^T w> over directions of one length.

    Two rows: w_1 = 1 / √(g_11 + g_12 √(g_11 / g_22)), w_2 = w_1 √(g_11 / g_22). The direction has
    length √R whatever the scale of the losses, so the learning rate alone decides how far a step
    goes, and a loss scaler, which divides `.grad` by S, makes it S times too short: hand over
    unscaled losses. The original code caps the length at 1 and keeps weights for several steps,
    which is not done here. Forget rows enter negated and their weights come back negated; subspace
    and zero rows take no part. Where the rows allow no common direction (two opposite rows, or any
    non-negative combination that vanishes to the dependence tolerance) the parties fall back to the
    disagreement point, w = 0: our reading, where the original code keeps the last weights. Meant
    for one mean row per (kind, task). On a GPU a fixed number of Newton steps, without waiting for
    it.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", arXiv 2202.01017, claim 3.1.
    """

    per = "task"
    scale_equivariant = False

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("NashMTL", G, roles)
        return fair_weights(G, roles, 1.0, dependence_tolerance(roles.dtype))

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1 on retain rows, -1 on forget rows, [R]: each loss by itself."""
        return signs(roles)
