"""Interference-aware multi-task unlearning on explicit gradient rows, by SVD and QR."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Rows, Sides
from mtu_fast.reference.mean import mean
from mtu_fast.reference.orthograd import independent, project_out


def interference_aware(
    retain: Rows, forget: Rows, subspace: Tensor, alpha: float = 0.5, order: str = "joint", *,
    targets: Collection[str] | None = None, energy: float = 1.0, rank: int | None = None, ridge: float = 0.0,
    tol: float = 1e-7, stale: float = 1e-3,
) -> Tensor:  # fmt: skip
    """Direction alpha · r − (1 − alpha) · d, with d the part of f inside span(subspace) and orthogonal to retain rows.

    Args:
        retain: {task: [k, P]} gradients to be protected; r is their mean per task, summed over
            tasks.
        forget: {task: [m, P]} gradients to be ascended; f likewise.
        subspace: [K, P] kept gradients of the target tasks; without rows there is no span to stay
            in.
        alpha: weight of the retain gradient.
        order: "joint" (both hold), "project-first" or "orthogonalize-first".
        targets: only the retain rows of these tasks are constraints; all by default.
        energy: share of the squared singular values of the subspace rows that the basis must hold.
        rank: the most dimensions of the basis.
        ridge: the constraints' softness, relative to their mean squared length in the basis.
        tol: length of a unit row's residual below which a retain row is dependent.
        stale: the same for subspace rows.

    Returns:
        The update direction [P].

    Source: our reading of arXiv 2605.19042.
    """
    # rows of the constraint, `[k, P]`
    held = torch.cat([g for task, g in retain.items() if targets is None or task in targets])
    f = mean(forget)
    # without kept rows the whole space
    U = torch.eye(len(f), dtype=f.dtype)
    if len(subspace):
        U = basis(subspace, energy, rank, stale)
    if order == "joint":
        # in coordinates of U, so that both hold at once
        d = U.t() @ constrained(U @ f, held @ U.t(), held, ridge, tol)
    elif order == "project-first":
        d = project_out(U.t() @ (U @ f), held, tol)
    else:
        d = U.t() @ (U @ project_out(f, held, tol))
    return alpha * mean(retain) - (1.0 - alpha) * d


def basis(rows: Tensor, energy: float, rank: int | None, stale: float) -> Tensor:
    """Orthonormal U [K, P]: all that the rows span, or the leading right singular vectors that hold the energy."""
    if energy == 1.0 and rank is None:
        taken = independent(rows, stale)
        # orthonormal rows that span the same
        return torch.linalg.qr(rows[taken].t()).Q.t()
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    power = values.square()
    dimension = 0
    # the fewest leading directions that hold the energy
    while dimension < len(power) and power[:dimension].sum() < energy * power.sum():
        dimension += 1
    dimension = min(dimension, int((values > stale * values[0]).sum()))
    return vectors[:dimension] if rank is None else vectors[: min(dimension, rank)]


def constrained(c: Tensor, B: Tensor, held: Tensor, ridge: float, tol: float) -> Tensor:
    """The part of c [K] orthogonal to the rows of B [k, K]; with a ridge, the c' of least |c' − c|² + |B c'|² / μ."""
    # rows of which nothing lies in the basis constrain nothing there
    B = B[B.norm(dim=1) > tol * held.norm(dim=1)]
    if not ridge or not len(B):
        return project_out(c, B, tol)
    mu = ridge * B.square().sum(1).mean()
    # the gradient of |c' − c|² + |B c'|²/μ is zero
    return torch.linalg.solve(torch.eye(len(c), dtype=c.dtype) + B.t() @ B / mu, c)


@dataclass(frozen=True)
class InterferenceAware(Reference, called="interference_aware"):
    """`interference_aware` of the two sides and the kept rows."""

    alpha: float = 0.5
    order: str = "joint"
    targets: Collection[str] | None = None
    energy: float = 1.0
    rank: int | None = None
    ridge: float = 0.0
    tol: float = 1e-6

    def direction(self, sides: Sides) -> Tensor:
        kept = sides.subspace
        if kept is None:
            kept = torch.cat(list(sides.retain.values()))[:0]
        return interference_aware(
            sides.retain, sides.forget, kept, self.alpha, self.order,
            targets=self.targets, energy=self.energy, rank=self.rank, ridge=self.ridge, tol=self.tol,
        )  # fmt: skip

    def outside(self, sides: Sides, task: str) -> Pair:
        return self.alpha, 1.0 - self.alpha
