"""Projections on the directions that conflict with no gradient, by trying every face of their cone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Sides, even


def dualproj(gradients: Tensor, g: Tensor | None = None) -> Tensor:
    """The nearest point to g, the mean gradient by default, of {d: ⟨g_i, d⟩ ≥ 0 for all i}: [R, P] -> [P].

    Source: arXiv 1706.08840, 2406.16232.
    """
    if not len(gradients):
        return gradients.sum(0)
    found = nearest(gradients, gradients.mean(0) if g is None else g, 0.0)
    return torch.zeros_like(gradients[0]) if found is None else found


def nearest(gradients: Tensor, g: Tensor, height: float, tol: float = 1e-11) -> Tensor | None:
    """The nearest point to g of {d: ⟨g_i, d⟩ ≥ height for all i}, None where that is empty.

    It is the nearest point of some {d: ⟨g_i, d⟩ = height for i in S}: of these 2^R points those
    count that lie in the set, up to `tol` of the lengths involved.
    """
    best: Tensor | None = None
    slack = tol * torch.linalg.vector_norm(gradients, dim=1) * torch.linalg.vector_norm(g)
    # 2^R faces: obviously right, and for a handful of rows only
    for S in subsets(len(gradients)):
        rows = gradients[S]
        d = g
        if S:
            # the shortest way from g to the rows' planes
            d = g + torch.linalg.pinv(rows, rtol=1e-12) @ (height - rows @ g)
        inside = bool((gradients @ d >= height - slack).all())
        if inside and (best is None or torch.dist(d, g) < torch.dist(best, g)):
            best = d
    return best


def subsets(R: int) -> list[list[int]]:
    """All subsets of R indices, the empty one first."""
    found: list[list[int]] = []
    for size in range(R + 1):
        found += map(list, combinations(range(R), size))
    return found


@dataclass(frozen=True)
class DualProj(Reference, called="dualproj"):
    """`dualproj` of the signed mean rows."""

    def direction(self, sides: Sides) -> Tensor:
        return dualproj(sides.signed_matrix())

    def outside(self, sides: Sides, task: str) -> Pair:
        return even(sides)
