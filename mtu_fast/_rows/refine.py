"""Refinement: what rounding leaves of `J_a d = 0` is measured on the rows, and taken off d.

Two things round. Weights from a Gram that errs by ε leave about ε · cond² of what they should
remove. Rounding `Jᵀ w` in the parameters' dtype leaves about eps · cond, also where the Gram is
exact. `J_a d` is known to float64 (`jvp`); the same Gram then gives the combination `Jᵀ c` that
removes it up to a share ε · cond² of itself. A pass is one vjp and one jvp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mtu_fast._ops._host_linalg import cholesky
from mtu_fast._ops.gram_schmidt import condition
from mtu_fast.methods import Method, Roles
from mtu_fast.methods.base import Constraint

# Of an inexact Gram: below, sums of float32 products in float64 cost no more digits than rounding
# `Jᵀ w` does.
CONDITION = 1e2
# Of an exact Gram: below, rounding `Jᵀ w` in float32 leaves cosines of some 1e-6.
CONDITION_EXACT = 1e4
# A pivot above this, for all rows, is a condition far below that.
PIVOT = 1e-1
PASSES = 3

Direction = dict[Tensor, Tensor]
Squares = Callable[[Mapping[Tensor, Tensor], Mapping[Tensor, int], Tensor], Tensor]


class Space(Protocol):
    """Rows: `vjp` is Jᵀ w, `jvp` is J d."""

    def vjp(self, w: Tensor) -> Direction: ...
    def jvp(self, d: Mapping[Tensor, Tensor], per: str = "total") -> Tensor: ...


def sensitive(method: Method, G: Tensor, roles: Roles, w: Tensor, exact: bool) -> Constraint | None:
    """What the weights of a method are bound to, if that is to be refined; else None.

    Args:
        method: the method.
        G: the Gram matrix, `[R, R]` or `[L, R, R]`.
        roles: of the R rows.
        w: what the method gave.
        exact: whether the Gram is exact, so that only `Jᵀ w` rounds. A row that depends on others
            is then held to the constraint by theirs.

    Returns:
        The constraint, where the rows are conditioned badly enough.
    """
    constraint = method.constraint(G, roles, w)
    if constraint is None:
        return None
    if exact and _is_well_conditioned(constraint.gram, constraint.active):
        return None
    limit, dependent = (CONDITION_EXACT, 0.0) if exact else (CONDITION, torch.inf)
    active = constraint.active
    # only rows that the constraint binds: others may be as dependent as they like
    inside = torch.where(active[:, None] & active, constraint.gram, 0.0)
    estimate = condition(inside, _length(G), constraint.tol, dependent)
    return constraint if bool((estimate > limit).any()) else None


def _is_well_conditioned(G: Tensor, active: Tensor) -> bool:
    """Whether no row is nearly in the span of those before it: a cheap look at one matrix on the CPU.

    Pivots of the Cholesky factor over the rows' lengths are the sines of these angles.
    """
    if G.dim() != 2 or G.device.type != "cpu":
        return False
    gram = G.numpy()
    at = (active.numpy() & (gram.diagonal() > 0)).nonzero()[0]
    chosen = gram[at[:, None], at]
    factor, failed = cholesky(chosen)
    # dependent rows have none
    return not failed and bool((factor.diagonal() > PIVOT * np.sqrt(chosen.diagonal())).all())


def refined(
    rows: Space,
    w: Tensor,
    constraint: Constraint,
    G: Tensor,
    blocks: Mapping[Tensor, int],
    per: str,
    squares: Squares,
) -> tuple[Direction, Tensor]:
    """`Jᵀ w`, its constrained part d by `d ← d - Jᵀ c(J d)`, and the largest `|J_a d| / (|J_a| |d|)` that is left.

    A pass counts in a block where it halves what is left and does not lengthen d: what is wrong in
    d lies in the span of the rows, across the true d, so that d is longer the more is wrong in it.
    The first pass that counts in none is the last; where a Gram is too rough to remove anything, d
    stays what it was.

    Args:
        rows: what w weighs.
        w: weights `[R]` or `[L, R]`.
        constraint: the part of w, and what is to hold of it.
        G: the Gram matrix that w was made from, `[R, R]` or `[L, R, R]`.
        blocks: {parameter: index of its block}; 0 where there is one.
        per: "total", "layer" or "tensor", the blocks.
        squares: gives `|d|²` of every block.

    Returns:
        {parameter: tensor of its shape}, and the residual `[]` or `[L]`.
    """
    length = _length(G)
    scale = torch.where(constraint.active & (length > 0), length.reciprocal(), 0.0)

    def measured(d: Direction) -> tuple[Tensor, Tensor, Tensor]:
        # J d in float64, and |d|
        Jd, size = rows.jvp(d, per), squares(d, blocks, G).sqrt()
        return Jd, size, (scale * Jd).abs().amax(-1) / torch.where(size > 0, size, 1.0)

    d = rows.vjp(constraint.part)
    Jd, size, residual = measured(d)
    for _ in range(PASSES):
        correction = rows.vjp(constraint.correction(Jd))
        tried = {p: t - correction.pop(p) for p, t in d.items()}  # one direction less is alive
        Jd_tried, size_tried, left = measured(tried)
        # a d that is as long but for rounding is no longer
        slack = 1.0 + max((torch.finfo(t.dtype).eps for t in d.values()), default=0.0)
        # `[]` or `[L]`: blocks converge apart from one another
        better = (2.0 * left < residual) & (size_tried <= slack * size)
        if not bool(better.any()):
            break
        d = {p: torch.where(better.reshape(-1)[blocks[p]], tried.pop(p), t) for p, t in d.items()}
        Jd = torch.where(better[..., None], Jd_tried, Jd)
        size, residual = torch.where(better, size_tried, size), torch.where(better, left, residual)
    # what the constraint does not bind is added last, and was never corrected
    rest = rows.vjp(w - constraint.part)
    return {p: t + rest[p] for p, t in d.items()}, residual


def _length(G: Tensor) -> Tensor:
    """`|J_r|` of every row, [..., R]."""
    return G.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()


def squares_of(d: Mapping[Tensor, Tensor], blocks: Mapping[Tensor, int], G: Tensor) -> Tensor:
    """`|d|²` of every block, as many as G has."""
    found = G.new_zeros(G.shape[:-2].numel())
    for p, t in d.items():
        found[blocks[p]] += torch.linalg.vector_norm(t, dtype=G.dtype).square()
    return found.view(G.shape[:-2])
