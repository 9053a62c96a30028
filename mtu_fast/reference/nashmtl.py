"""Nash-MTL on explicit gradient vectors: FairGrad with exponent one."""

from __future__ import annotations

from torch import Tensor

from mtu_fast.reference.base import Sides, reference
from mtu_fast.reference.fairgrad import fairgrad


def nashmtl(gradients: Tensor) -> Tensor:
    """Σ w_i g_i with w > 0 and <g_i, Σ_j w_j g_j> = 1 / w_i; zero where there is no such w: [R, P] -> [P].

    Source: arXiv 2202.01017, claim 3.1.
    """
    return fairgrad(gradients, 1.0)


@reference("nashmtl")
def direction(sides: Sides) -> Tensor:
    """`nashmtl` of the signed mean rows."""
    return nashmtl(sides.signed_matrix())
