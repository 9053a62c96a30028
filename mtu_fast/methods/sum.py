"""Sum: the tasks' mean gradients added up, forget rows negated; what surgery starts from."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.methods.base import FORGET, RETAIN, Roles, mean_weights


class Sum:
    """w = 1 on the mean retain row and -1 on the mean forget row of each task.

    Sample rows get 1 / count and -1 / count, which is the same direction; subspace rows 0. Needs no
    Gram matrix: one weighted backward.
    """

    per = "task"
    granularity = "global"
    needs_gram = False

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read."""
        return mean_weights(roles, RETAIN) - mean_weights(roles, FORGET)

    def outside(self, roles: Roles) -> Tensor:
        """The same weights [R]."""
        return self(None, roles)

    def __repr__(self) -> str:
        return "Sum()"
