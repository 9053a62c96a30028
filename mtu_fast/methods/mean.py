"""Mean: the ordinary update, every row alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import Roles, mean_weights


@dataclass(frozen=True)
class Mean(Method):
    """w_r = 1 / count of the task's rows: the gradient of `sum(l.mean() for l in losses.values())`.

    Roles make no difference: forget and retain rows are averaged together. Needs no Gram matrix.
    """

    needs_gram = False
    allows_absent = True

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read."""
        return mean_weights(roles, None)
