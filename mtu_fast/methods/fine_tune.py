"""Fine-tuning: go on training on the retained data, and wait for the rest to fade."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import RETAIN, Roles, mean_weights


@dataclass(frozen=True)
class FineTune(Method):
    """w = 1/k on the k retain rows of each task, 0 elsewhere.

    The forget rows have no influence. The same as `GradDiff(alpha=1)`. Needs no Gram matrix: one
    weighted backward.

    Source: Golatkar, Achille and Soatto, "Eternal Sunshine of the Spotless Net", arXiv 1911.04933,
    where it is a baseline.
    """

    needs_gram = False
    allows_absent = True

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read."""
        return mean_weights(roles, RETAIN)
