"""Fine-tuning: go on training on the retained data, and wait for the rest to fade."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.methods.base import RETAIN, Roles, mean_weights


class FineTune:
    """w = 1/k on the k retain rows of each task, 0 elsewhere.

    Forget rows are not looked at. The same as `GradDiff(alpha=1)`. Needs no Gram matrix: one
    weighted backward.

    Source: Golatkar, Achille and Soatto, "Eternal Sunshine of the Spotless Net", arXiv 1911.04933,
    where it is a baseline.
    """

    per = "sample"
    granularity = "global"
    needs_gram = False

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read."""
        return mean_weights(roles, RETAIN)

    def outside(self, roles: Roles) -> Tensor:
        """The same weights [R]."""
        return self(None, roles)

    def __repr__(self) -> str:
        return "FineTune()"
