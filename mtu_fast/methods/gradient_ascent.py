"""Gradient ascent: climb the forget loss, with no regard to the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import FORGET, Roles, mean_weights


@dataclass(frozen=True)
class GradientAscent(Method):
    """w = -1/m on the m forget rows of each task, 0 elsewhere.

    Nothing protects the retained data: it is the lower bar for every other method. The same as
    `GradDiff(alpha=0)`. Needs no Gram matrix: one weighted backward.

    Source: Golatkar, Achille and Soatto, "Eternal Sunshine of the Spotless Net", arXiv 1911.04933,
    where it is the baseline of negated gradients.
    """

    needs_gram = False
    allows_absent = True

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read."""
        return -mean_weights(roles, FORGET)
