"""Projection on the span of a step's constraint rows and of those kept in memory, in Gram space."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast._ops.gram_schmidt import solve, whiten
from mtu_fast.methods._gram import times
from mtu_fast.methods.roles import Roles

# Length, of a kept row scaled to length one, below which what the step's rows and other kept ones
# leave of it is no constraint: it was taken at other parameters, and says no more than that.
FADED = 1e-2


def onto(G: Tensor, rhs: Tensor, active: Tensor, roles: Roles, tol: float) -> tuple[Tensor, Tensor]:
    """x = G_AA⁺ rhs_A with A the active rows of the step and those in memory, and the rank of A.

    The step's rows come first, to `tol`; a kept row adds what they and the kept rows before it
    leave, where that is at least FADED of its length. So the projection is exact on the step's rows
    however many there are in memory.

    Args:
        G: Gram matrix [..., R, R], float64.
        rhs: inner products with the vector that is projected, [..., R].
        active: the constraint rows of the step, [R] bool.
        roles: what the rows are; those in memory are the last.
        tol: what `dependence_tolerance` gives for the rows.

    Returns:
        Weights x [..., R], 0 outside A, and the rank [...] int64.
    """
    if not roles.memory:
        return solve(G, rhs, active, tol)
    own = len(roles) - roles.memory
    inside = active[:own, None] & active[:own]
    T, spanning = whiten(G[..., :own, :own] * inside, tol)
    B = T @ G[..., :own, own:]  # the kept rows in an orthonormal basis of the step's
    c = times(T, rhs[..., :own])
    S = G[..., own:, own:] - B.mT @ B  # Gram matrix of what is left of them
    length = G.diagonal(dim1=-2, dim2=-1)[..., own:]
    alive = S.diagonal(dim1=-2, dim2=-1) > FADED**2 * length
    S = torch.where(alive[..., None] & alive[..., None, :], S, 0.0)
    left = torch.where(alive, rhs[..., own:] - times(B.mT, c), 0.0)
    every = torch.ones_like(active[own:])
    kept, rank = solve(S, left, every, FADED)
    # back-substitution: the step's rows do the rest
    mine = times(T.mT, c - times(B, kept))
    return torch.cat([mine, kept], -1), spanning.sum(-1) + rank
