"""UPGrad on explicit gradient vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast.reference.base import Sides, even, reference
from mtu_fast.reference.dualproj import dualproj


def upgrad(gradients: Tensor) -> Tensor:
    """The mean of the gradients, each projected on {d: ⟨g_i, d⟩ ≥ 0 for all i}: [R, P] -> [P].

    Source: arXiv 2406.16232.
    """
    if not len(gradients):
        return gradients.sum(0)
    return torch.stack([dualproj(gradients, g) for g in gradients]).mean(0)


@reference("upgrad", outside=even)
def direction(sides: Sides) -> Tensor:
    """`upgrad` of the signed mean rows."""
    return upgrad(sides.signed_matrix())
