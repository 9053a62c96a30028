"""GradDiff: descend on retain, ascend on forget."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.methods.base import FORGET, RETAIN, Roles, check_fraction, mean_weights


class GradDiff:
    """w = alpha/k on the k retain rows and -(1 - alpha)/m on the m forget rows of each task.

    alpha = 0 is gradient ascent, alpha = 1 fine-tuning on the retain rows. Needs no Gram matrix:
    one weighted backward.

    Args:
        alpha: weight of the retain gradient, in [0, 1].

    Raises:
        TypeError: `alpha` is not a number.
        ValueError: `alpha` is outside [0, 1].

    Source: gradient difference (also NegGrad+), Liu, Liu and Stone, "Continual Learning and Private
    Unlearning", arXiv 2203.12817, section 4.
    """

    per = "sample"
    granularity = "global"
    needs_gram = False

    def __init__(self, alpha: float = 0.5) -> None:
        self.alpha = check_fraction("GradDiff", "alpha", alpha)

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read."""
        return self.alpha * mean_weights(roles, RETAIN) - (1.0 - self.alpha) * mean_weights(
            roles, FORGET
        )

    def outside(self, roles: Roles) -> Tensor:
        """The same weights [R]."""
        return self(None, roles)

    def __repr__(self) -> str:
        return f"GradDiff(alpha={self.alpha})"
