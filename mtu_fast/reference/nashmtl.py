"""Nash-MTL on explicit gradient vectors: FairGrad with exponent one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.reference.base import Reference, Sides
from mtu_fast.reference.fairgrad import fairgrad


def nashmtl(gradients: Tensor) -> Tensor:
    """Σ w_i g_i with w > 0 and <g_i, Σ_j w_j g_j> = 1 / w_i; zero where there is no such w: [R, P] -> [P].

    Source: arXiv 2202.01017, claim 3.1.
    """
    return fairgrad(gradients, 1.0)


@dataclass(frozen=True)
class NashMTL(Reference, called="nashmtl"):
    """`nashmtl` of the signed mean rows."""

    def direction(self, sides: Sides) -> Tensor:
        return nashmtl(sides.signed_matrix())
