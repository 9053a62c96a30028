"""OrthoGrad: ascend on forget, orthogonally to every retain row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.methods._arguments import check_fraction, check_gram, check_granularity
from mtu_fast.methods._memory import onto
from mtu_fast.methods.base import Constraint, Granularity, Method, dependence_tolerance
from mtu_fast.methods.roles import RETAIN, Roles, retain_and_forget, retain_less_forget


@dataclass(frozen=True)
class OrthoGrad(Method):
    """Weights alpha r - (1 - alpha) (f - G_rr^+ G_r. f), with r and f the mean weights of retain and forget rows.

    The direction J^T w is alpha times the mean retain gradient minus (1 - alpha) times the part of
    the mean forget gradient that is orthogonal to every retain row. Means are per task and summed
    over tasks; each retain row, of whatever task, is a constraint of its own. Without forget rows w
    = alpha r, without retain rows -(1 - alpha) f. Dependent and zero retain rows are ordinary
    input: they are left out of the basis, see `with_rank`. Rows of an `mtu_fast.Memory` are further
    constraints, which get no part of r.

    Args:
        alpha: weight of the retain gradient, in [0, 1]; 0 is pure orthogonalised ascent.
        granularity: "global" as in the paper, or "layer" or "tensor": each block is orthogonalised
            on its own. A block with no more parameters than retain rows then never unlearns.

    Raises:
        TypeError: `alpha` is not a number.
        ValueError: `alpha` is outside [0, 1], or `granularity` is unknown.

    Source: Shamsian et al., "Go Beyond Your Means: Unlearning with Per-Sample Gradient
    Orthogonalization", arXiv 2503.02312; Gram form of its projection g - Q Q^T g.
    """

    alpha: float = 0.5
    granularity: Granularity = "global"
    takes_memory = True
    allows_absent = True
    averages_forget = True

    def __post_init__(self) -> None:
        check_fraction("OrthoGrad", "alpha", self.alpha)
        check_granularity("OrthoGrad", self.granularity)

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R]; errors as in `with_rank`."""
        return self.with_rank(G, roles)[0]

    def with_rank(self, G: Tensor, roles: Roles) -> tuple[Tensor, Tensor]:
        """Weights [..., R] and the rank [...] int64 of the constraints: how many directions were protected.

        A `G` that is no floating tensor, or rows of a dtype without a tolerance, is a TypeError; a
        `G` whose size is not the number of rows in `roles` a ValueError.
        """
        G = check_gram("OrthoGrad", G, roles)
        r, f = retain_and_forget(roles)
        tol = dependence_tolerance(roles.dtype)
        # G f holds the inner products of the mean forget gradient with every row
        x, rank = onto(G, G @ f, roles.kind == RETAIN, roles, tol)
        return torch.sub(self.alpha * r, f - x, alpha=1.0 - self.alpha), rank

    def constraint(self, G: Tensor, roles: Roles, w: Tensor) -> Constraint:
        """What is left of the forget gradient, w - alpha r, is orthogonal to every retain row."""
        retain = roles.kind == RETAIN
        r, _ = retain_and_forget(roles)
        part = torch.sub(w, r, alpha=self.alpha)
        return Constraint(part, retain, G, dependence_tolerance(roles.dtype))

    def outside(self, roles: Roles) -> Tensor:
        """Weights alpha r - (1 - alpha) f, [R]: the weights before orthogonalisation.

        With the surgery's weights, parameters outside (heads) would ascend on retain data.
        """
        return retain_less_forget(roles, self.alpha)
