"""FairGrad: alpha-fair shares of the improvement between the rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast._arguments import check_real, shown
from mtu_fast.methods._arguments import check_gram
from mtu_fast.methods._bargaining import fair_weights
from mtu_fast.methods.base import Method, dependence_tolerance
from mtu_fast.methods.roles import Roles, signs

LEAST, MOST = 0.2, 10.0


@dataclass(frozen=True)
class FairGrad(Method):
    """G w = w^(-1/a), w > 0: the w whose J^T w is alpha-fair to all rows, with a the alpha of the paper.

    a = 1 is Nash-MTL; a towards 0 is `Sum`, a large a cares for the row that gains least. Scaling
    all losses by c scales w by c^(-2a / (1+a)) and d by c^((1-a) / (1+a)), so that a loss scaler,
    which divides `.grad` by c, leaves c^(-2a / (1+a)) of d: hand over unscaled losses. Forget rows
    enter negated and their weights come back negated; subspace and zero rows take no part. Where
    the rows allow no common direction (a non-negative combination of them vanishes to the
    dependence tolerance) w = 0: our reading. Meant for one mean row per (kind, task). On a GPU
    a fixed number of Newton steps, without waiting for it; with rows whose lengths are three
    decades apart they end at rounding for a from 0.5 to 5 only.

    Args:
        a: exponent of fairness, from 0.2 to 10.

    Raises:
        TypeError: `a` is not a number.
        ValueError: `a` is outside this range, where the fixed number of steps is not enough.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", arXiv 2402.15638,
    equation 4.
    """

    a: float = 2.0
    per = "task"
    scale_equivariant = False

    def __post_init__(self) -> None:
        expected = f"a number from {LEAST} to {MOST:g}"
        check_real("FairGrad: a", self.a, expected)
        if not LEAST <= self.a <= MOST:
            raise ValueError(
                f"FairGrad: a: found {shown(self.a)}, expected {expected}; a = 0 is mtu.Sum(), and a larger one comes "
                "near max-min fairness already."
            )

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G = check_gram("FairGrad", G, roles)
        return fair_weights(G, roles, self.a, dependence_tolerance(roles.dtype))

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1 on retain rows, -1 on forget rows, [R]: each loss by itself."""
        return signs(roles)
