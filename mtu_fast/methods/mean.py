"""Mean: the ordinary update, every row alike."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.methods.base import Roles, mean_weights


class Mean:
    """w_r = 1 / count of the task's rows: the gradient of `sum(l.mean() for l in losses.values())`.

    Roles make no difference: forget and retain rows are averaged together. Needs no Gram matrix.
    """

    per = "sample"
    granularity = "global"
    needs_gram = False

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read."""
        return mean_weights(roles, None)

    def outside(self, roles: Roles) -> Tensor:
        """The same weights [R]."""
        return mean_weights(roles, None)

    def __repr__(self) -> str:
        return "Mean()"
