"""OrthoGrad on explicit gradient rows, by QR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Rows, Sides
from mtu_fast.reference.mean import mean


def orthograd(retain: Rows, forget: Rows, alpha: float = 0.5, tol: float = 1e-7) -> Tensor:
    """Direction alpha · r − (1 − alpha) · (f − Q Qᵀ f), with Q an orthonormal basis of all retain rows.

    Args:
        retain: {task: [k, P]} gradients to be protected; r is their mean per task, summed over
            tasks.
        forget: {task: [m, P]} gradients to be ascended; f likewise.
        alpha: weight of the retain gradient.
        tol: a unit-length row whose residual on the rows already taken is shorter is dependent, and
            left out.

    Returns:
        The update direction [P].

    Source: arXiv 2503.02312.
    """
    return alpha * mean(retain) - (1.0 - alpha) * project_out(
        mean(forget), torch.cat(list(retain.values())), tol
    )


@dataclass(frozen=True)
class OrthoGrad(Reference, called="orthograd"):
    """`orthograd` of the two sides."""

    alpha: float = 0.5
    tol: float = 1e-6

    def direction(self, sides: Sides) -> Tensor:
        return orthograd(sides.retain, sides.forget, self.alpha, self.tol)

    def outside(self, sides: Sides, task: str) -> Pair:
        return self.alpha, 1.0 - self.alpha


def orthograd_blocks(
    retain: Mapping[str, Rows], forget: Mapping[str, Rows], alpha: float = 0.5, tol: float = 1e-7
) -> dict[str, Tensor]:
    """`orthograd` on each layer or tensor by itself: {block: {task: [n, P_b]}} twice -> {block: [P_b]}."""
    return {block: orthograd(retain[block], forget[block], alpha, tol) for block in retain}


def project_out(g: Tensor, rows: Tensor, tol: float) -> Tensor:
    """The residual g − Q Qᵀ g on the span of rows [k, P]; taken twice, since once leaves some eps · ‖g‖ behind."""
    basis = independent(rows, tol)
    if not basis:
        return g
    Q = torch.linalg.qr(rows[basis].t()).Q  # [P, rank]
    g = g - Q @ (Q.t() @ g)
    return g - Q @ (Q.t() @ g)


def independent(rows: Tensor, tol: float) -> list[int]:
    """Indices of independent rows: always take the unit-length row with the longest residual, until that is < tol.

    `len` of the result is the effective rank. Rows are divided by their length, so that scale does
    not decide.
    """
    length = torch.linalg.vector_norm(rows, dim=1)
    taken: list[int] = []
    rest = rows / torch.where(length > 0, length, 1.0)[:, None]
    for _step in range(min(rows.shape)):
        residual = torch.linalg.vector_norm(rest, dim=1)
        residual[taken] = 0.0
        best = int(residual.argmax())
        if residual[best] < tol:
            break
        taken.append(best)
        q = rest[best] / residual[best]
        # once leaves eps of the longest row behind, which would count as a direction
        for _twice in range(2):
            rest -= torch.outer(rest @ q, q)
    return taken
