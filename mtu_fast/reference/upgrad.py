"""UPGrad on explicit gradient vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Sides, even
from mtu_fast.reference.dualproj import dualproj


def upgrad(gradients: Tensor) -> Tensor:
    """The mean of the gradients, each projected on {d: ⟨g_i, d⟩ ≥ 0 for all i}: [R, P] -> [P].

    Source: arXiv 2406.16232.
    """
    if not len(gradients):
        return gradients.sum(0)
    return torch.stack([dualproj(gradients, g) for g in gradients]).mean(0)


@dataclass(frozen=True)
class UPGrad(Reference, called="upgrad"):
    """`upgrad` of the signed mean rows."""

    def direction(self, sides: Sides) -> Tensor:
        return upgrad(sides.signed_matrix())

    def outside(self, sides: Sides, task: str) -> Pair:
        return even(sides)
