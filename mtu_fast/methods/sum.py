"""Sum: the tasks' mean gradients added up, forget rows negated; what surgery starts from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import FORGET, RETAIN, Roles, mean_weights


@dataclass(frozen=True)
class Sum(Method):
    """w = 1 on the mean retain row and -1 on the mean forget row of each task.

    Sample rows get 1 / count and -1 / count, which is the same direction; subspace rows 0. Needs no
    Gram matrix: one weighted backward.
    """

    per = "task"
    needs_gram = False
    allows_absent = True

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read."""
        return mean_weights(roles, RETAIN) - mean_weights(roles, FORGET)
