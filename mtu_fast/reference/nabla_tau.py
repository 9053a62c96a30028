"""∇τ on explicit gradient rows, by the chain rule on its squared relu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Rows, Sides
from mtu_fast.reference.mean import mean


def nabla_tau(
    retain: Rows,
    forget: Rows,
    forget_losses: Mapping[str, Tensor],
    tau: Mapping[str, float],
    alpha: float,
) -> Tensor:
    """Gradient of Σ_t alpha · relu(τ_t − L_t)² + (1 − alpha) · mean retain loss, L_t the task's mean forget loss.

    Args:
        retain: {task: [k, P]} gradients.
        forget: {task: [m, P]} gradients.
        forget_losses: {task: [m]} loss values, in the order of the rows.
        tau: {task: threshold}.
        alpha: weight of the forget term.

    Returns:
        The update direction [P].

    Source: arXiv 2403.14339.
    """
    d = (1.0 - alpha) * mean(retain)
    for task, rows in forget.items():
        if len(rows):
            gap = torch.relu(tau[task] - forget_losses[task].mean())
            d = d + alpha * 2.0 * gap * -rows.mean(0)  # d relu(x)² = 2 relu(x) dx
    return d


@dataclass(frozen=True)
class NablaTau(Reference, called="nabla_tau"):
    """`nabla_tau` of the two sides."""

    tau: Mapping[str, float] = field(default_factory=dict)
    alpha: float = 0.5

    def direction(self, sides: Sides) -> Tensor:
        return nabla_tau(sides.retain, sides.forget, sides.forget_loss, self.tau, self.alpha)

    def outside(self, sides: Sides, task: str) -> Pair:
        loss = sides.forget_loss[task]
        gap = torch.relu(self.tau[task] - loss.mean()) if len(loss) else 0.0
        return 1.0 - self.alpha, self.alpha * 2.0 * gap
