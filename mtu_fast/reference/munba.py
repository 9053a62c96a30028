"""MUNBa on explicit gradient vectors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtu_fast.reference.base import Reference, Sides
from mtu_fast.reference.mean import mean


def munba(r: Tensor, f: Tensor, tol: float = 1e-7) -> Tensor:
    """The bargain between r and f [P], both to be descended on; r + 0.1 f where a side is zero or f opposite to r.

    d = (r / ‖r‖ + f / ‖f‖) / √(1 + cos): both sides gain <d, r> / ‖r‖ = <d, f> / ‖f‖ = √(1 + cos).

    Source: arXiv 2411.15537.
    """
    if r.norm() == 0 or f.norm() == 0:
        return r + 0.1 * f
    unit, other = r / r.norm(), f / f.norm()
    # ‖r/‖r‖ + f/‖f‖‖² = 2 (1 + cos)
    share = 1 + unit @ other
    if share <= tol**2:
        return r + 0.1 * f
    return (unit + other) / share.sqrt()


@dataclass(frozen=True)
class MUNBa(Reference, called="munba"):
    """`munba` of the summed mean retain gradients and the negated forget ones."""

    tol: float = 1e-7

    def direction(self, sides: Sides) -> Tensor:
        return munba(mean(sides.retain), -mean(sides.forget), self.tol)
