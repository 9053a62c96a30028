"""FairGrad: alpha-fair shares of the improvement between the rows."""

from __future__ import annotations

from math import isfinite

from torch import Tensor

from mtu_fast.methods.bargaining import fair_weights
from mtu_fast.methods.base import Roles, dependence_tolerance
from mtu_fast.methods.signed import signed_gram, signs

LEAST, MOST = 0.2, 10.0


class FairGrad:
    """G w = w^(-1/a), w > 0: the w whose J^T w is alpha-fair to all rows, with a the alpha of the paper.

    a = 1 is Nash-MTL; a towards 0 is `Sum`, a large a cares for the row that gains least. Scaling
    all losses by c scales w by c^(-2a / (1+a)) and d by c^((1-a) / (1+a)), so that a loss scaler,
    which divides `.grad` by c, leaves c^(-2a / (1+a)) of d: hand over unscaled losses. Forget rows
    enter negated and their weights come back negated; subspace and zero rows take no part. Where
    the rows allow no common direction (a non-negative combination of them vanishes to the
    dependence tolerance) w = 0: our reading. Meant for one mean row per (kind, task). A fixed
    number of Newton steps on the device of G, without waiting for it; with rows whose lengths are
    three decades apart they end at rounding for a from 0.5 to 5 only.

    Args:
        a: exponent of fairness, from 0.2 to 10.

    Raises:
        TypeError: `a` is not a number.
        ValueError: `a` is outside this range, where the fixed number of steps is not enough.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", arXiv 2402.15638,
    equation 4.
    """

    per = "task"
    granularity = "global"
    needs_gram = True

    def __init__(self, a: float = 2.0) -> None:
        if isinstance(a, bool) or not isinstance(a, int | float):
            raise TypeError(
                f"FairGrad: a is {a!r} ({type(a).__name__}), expected a number from {LEAST} to {MOST:g}."
            )
        if not (isfinite(a) and LEAST <= a <= MOST):
            raise ValueError(
                f"FairGrad: a is {a}, expected a number from {LEAST} to {MOST:g}; a = 0 is mtu.Sum(), and a larger one "
                "comes near max-min fairness already."
            )
        self.a = float(a)

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles` a ValueError.
        """
        G, sign = signed_gram("FairGrad", G, roles)
        return sign * fair_weights(G, self.a, dependence_tolerance(roles.dtype))

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1 on retain rows, -1 on forget rows, [R]: each loss by itself."""
        return signs(roles)

    def __repr__(self) -> str:
        return f"FairGrad(a={self.a})"
