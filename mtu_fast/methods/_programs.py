"""Convex programs over the Gram matrix of a few rows, batched and on its device: what methods of hulls and cones share.

All are one problem, x ≥ 0, s = M x + q ≥ 0, x·s = 0 with M positive semidefinite, and have one
solver, `complementary`.

* Projection on the cone {d: J d ≥ 0}: min ½‖Jᵀ(u + x)‖² over x ≥ 0, so M = G, q = G u (`project`).
* Least norm over the simplex: min ½‖Jᵀx‖² + ½(1·x - 1)² over x ≥ 0, so M = G + 11ᵀ, q = -1
  (`least_norm`). On a ray x = t w with 1·w = 1 the best t leaves ½ N / (1 + N) of N = ‖Jᵀw‖², which
  increases with N: w = x / (1·x) has the least N. The optimum t = 1 / (1 + N) exists even where the
  hull of the rows contains 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast._later import is_host
from mtu_fast.methods._gram import UnitRows, norm, times

# 11 to 20 reach rounding; nearly 30 where x and s vanish together, as between orthogonal rows
STEPS = 30
SHORT = 0.995  # share of the way to the boundary that a step may go
# least s/x beside the unit diagonal of M: a singular M still factors, and Newton's steps correct
# for it
FLOOR = 1e-14
DONE = 1e-30  # mean of x s below which a problem rests
TINY = torch.finfo(torch.float64).tiny


def complementary(M: Tensor, q: Tensor) -> Tensor:
    """x ≥ 0 with s = M x + q ≥ 0 and x·s = 0: the minimum of ½ xᵀM x + qᵀx over x ≥ 0.

    Mehrotra's predictor-corrector interior point from x = s = 1, whatever M x + q is there:
    convergence asks for a solution, neither for an interior nor for uniqueness. Among several
    solutions one of moderate size is found. On the CPU the steps end where every problem rests.

    Args:
        M: [..., R, R] positive semidefinite, diagonal near 1; may be singular.
        q: [..., R] of order 1, in a batch that broadcasts with that of M; R > 0.

    Returns:
        x [..., R].
    """
    point = q.new_ones(2, *q.shape)  # x, s
    for _step in range(STEPS):
        x, s = point
        # the complementarity gap, 0 at the solution
        gap = (x * s).mean(-1, keepdim=True)
        open_ = gap > DONE
        if is_host(q.device) and not bool(open_.any()):
            break
        # what s = M x + q lacks: the start need not be feasible
        missing = s - times(M, x) - q
        # s and ds eliminated: (M + diag(s/x)) dx = …, one factor for both solves
        factor = torch.linalg.cholesky_ex(M + torch.diag_embed((s / x).clamp(min=FLOOR)))[0]
        # Mehrotra's predictor: a step to the boundary, not taken, shows how much of the gap can go
        predictor = _newton(factor, point, missing, -x * s)
        ahead_x, ahead_s = point + predictor * _reach(point, predictor, 1.0)
        # his centring: the share of the gap that would be left, cubed
        centre = gap * ((ahead_x * ahead_s).mean(-1, keepdim=True) / gap) ** 3
        # with the second order of the predictor taken off
        move = _newton(factor, point, missing, centre - x * s - predictor[0] * predictor[1])
        after = point + move * _reach(point, move, SHORT)
        # a step that failed to be solved for is not taken; the others go on
        moving = open_ & after.isfinite().all(-1, keepdim=True).all(0)
        point = torch.where(moving, after, point)
    return point[0]


def _newton(factor: Tensor, point: Tensor, missing: Tensor, change: Tensor) -> Tensor:
    """(dx, ds) [2, ..., R] with M dx - ds = missing and s dx + x ds = change; factor is that of M + diag(s/x)."""
    x, s = point
    dx = torch.cholesky_solve((missing + change / x)[..., None], factor)[..., 0]
    # ds from s dx + x ds = change
    return torch.stack([dx, (change - s * dx) / x])


def _reach(point: Tensor, move: Tensor, share: float) -> Tensor:
    """The longest step [..., 1] up to 1 that takes x and s no more than this share of the way to 0."""
    return share / (-move / point).amax((0, -1)).clamp(min=share)[..., None]


def cosines(rows: UnitRows, u: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines b [..., R] of g = Σ u_i g_i with the unit rows (1 where not live), and ‖g‖ [..., 1]."""
    scaled = torch.where(rows.live, u * rows.length, 0.0)
    size = norm(rows.E, scaled)
    b = (times(rows.E, scaled) / size.clamp(min=TINY)).clamp(-1.0, 1.0)
    return torch.where(rows.live, b, 1.0), size


def project(rows: UnitRows, u: Tensor) -> Tensor:
    """argmin ‖Jᵀv‖² over v ≥ u: the weights v [..., R] of the projection of Jᵀu on {d: J d ≥ 0}; v = u if not live."""
    b, size = cosines(rows, u)
    x = complementary(rows.E, b)
    return u + torch.where(rows.live, x * size / rows.length, 0.0)


def least_norm(rows: UnitRows) -> tuple[Tensor, Tensor]:
    """Coefficients x and a [..., R]: Σ x_i (unit row i) has the least norm over x ≥ 0 with a·x = 1, a ~ 1 / length.

    a is 1 for the shortest live row and 0 where a row is not live; the rows themselves have the
    weights a x.
    """
    shortest = torch.where(rows.live, rows.length, torch.inf).amin(-1, keepdim=True)
    a = torch.where(rows.live, shortest / rows.length, 0.0)
    x = complementary(rows.E + a[..., None] * a[..., None, :], torch.where(rows.live, -a, 1.0))
    return torch.where(rows.live, x / (a * x).sum(-1, keepdim=True).clamp(min=TINY), 0.0), a
