"""GradDiff: descend on retain, ascend on forget."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.methods._arguments import check_fraction
from mtu_fast.methods.base import Method
from mtu_fast.methods.roles import Roles, retain_less_forget


@dataclass(frozen=True)
class GradDiff(Method):
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

    alpha: float = 0.5
    needs_gram = False
    allows_absent = True

    def __post_init__(self) -> None:
        check_fraction("GradDiff", "alpha", self.alpha)

    def __call__(self, G: Tensor | None, roles: Roles) -> Tensor:
        """Weights [R], float64; `G` is not read."""
        return retain_less_forget(roles, self.alpha)
