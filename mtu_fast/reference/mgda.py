"""MGDA on explicit gradient vectors, by trying every face of their hull."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Sides, even
from mtu_fast.reference.dualproj import subsets


def mgda(gradients: Tensor) -> Tensor:
    """The point of least norm in the convex hull of the gradients: [R, P] -> [P].

    It is the point of least norm in the affine hull of some independent subset, with weights that
    are not negative.

    Source: arXiv 1810.04650.
    """
    if not len(gradients):
        return gradients.sum(0)
    best = gradients[0]
    # every face of the hull, as sets of corners
    for first, *others in subsets(len(gradients))[1:]:
        # the affine hull is first + edges @ weights
        edges = (gradients[others] - gradients[first]).t()  # [P, |S| - 1]
        # least ‖first + edges w‖: w = −edges⁺ first
        weights = -torch.linalg.pinv(edges, rtol=1e-12) @ gradients[first]
        d = gradients[first] + edges @ weights
        if bool((weights >= 0).all()) and weights.sum() <= 1 and d.norm() < best.norm():
            best = d
    return best


@dataclass(frozen=True)
class MGDA(Reference, called="mgda"):
    """`mgda` of the signed mean rows."""

    def direction(self, sides: Sides) -> Tensor:
        return mgda(sides.signed_matrix())

    def outside(self, sides: Sides, task: str) -> Pair:
        return even(sides)
