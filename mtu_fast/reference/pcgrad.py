"""PCGrad on explicit gradient vectors, as the paper's loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.reference.base import Reference, Sides


def pcgrad(gradients: Tensor, orders: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Σ_i g_i after g_i ← g_i − (g_i·g_j / ‖g_j‖²) g_j for every j ≠ i with g_i·g_j < 0, one after another.

    Args:
        gradients: [R, P], one gradient per task; a gradient to be ascended is negated by the
            caller.
        orders: for every i the order of its j; increasing by default.

    Returns:
        The update direction [P].

    Source: arXiv 2001.06782, algorithm 1.
    """
    total = gradients.new_zeros(gradients.shape[1])
    for i in range(len(gradients)):
        g = gradients[i].clone()
        for j in visited(len(gradients), i, orders):
            dot = torch.dot(g, gradients[j])
            if dot < 0:
                g = g - dot / torch.dot(gradients[j], gradients[j]) * gradients[j]
        total = total + g
    return total


def visited(R: int, i: int, orders: Sequence[Sequence[int]] | None) -> list[int]:
    """The rows j ≠ i of R that row i meets, in its order; increasing without orders."""
    chosen = range(R) if orders is None else orders[i]
    return [j for j in chosen if j != i]


@dataclass(frozen=True)
class PCGrad(Reference, called="pcgrad"):
    """`pcgrad` of the signed mean rows."""

    orders: Sequence[Sequence[int]] | None = None

    def direction(self, sides: Sides) -> Tensor:
        return pcgrad(sides.signed_matrix(), self.orders)
