"""CAGrad: the direction near the mean row that is best for the row it serves worst."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtu_fast.methods._programs import (
    TINY,
    UnitRows,
    complementary,
    cosines,
    equilibrate,
    least_norm,
    norm,
    preference,
)
from mtu_fast.methods.base import Roles, check_gram, dependence_tolerance

# a bracket shrinks at least 7 times a round, quadratically once it holds no kink
POINTS, ROUNDS = 8, 6


class CAGrad:
    """w = 1/T + c ‖g_0‖ / ‖J^T p‖ · p with p = argmin pᵀG 1/T + c ‖g_0‖ √(pᵀG p) over the simplex, g_0 = J^T 1/T.

    That is d = argmax min_i ⟨g_i, d⟩ over ‖d - g_0‖ ≤ c ‖g_0‖; c = 0 is the mean. Where the hull of
    the rows contains 0 no direction serves all, and several may conflict with none: d is then the
    nearest of them to g_0, `DualProj`'s, if the ball holds it (our reading; the paper's formula
    divides by 0). A zero row is such a case. Forget rows enter negated and their weights come back
    negated; subspace rows take no part; T counts the rows that do. The result is not rescaled by 1
    + c or 1 + c². Meant for one mean row per (kind, task). Runs on the device of G without waiting
    for it.

    Args:
        c: radius of the ball in units of ‖g_0‖, at least 0; the paper's proof for the mean loss
            holds for c < 1.

    Raises:
        TypeError: `c` is not a number.
        ValueError: `c` is negative or not finite.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", arXiv
    2110.14048, algorithm 1.
    """

    per = "task"
    granularity = "global"
    needs_gram = True

    def __init__(self, c: float = 0.5) -> None:
        if isinstance(c, bool) or not isinstance(c, int | float):
            raise TypeError(
                f"CAGrad: c is {c!r} ({type(c).__name__}), expected a number of at least 0."
            )
        if not (math.isfinite(c) and c >= 0.0):
            raise ValueError(
                f"CAGrad: c is {c}, expected a finite number of at least 0; 0 is the mean row."
            )
        self.c = float(c)

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R].

        A `G` that is no floating tensor, or rows of a dtype without a tolerance, is a TypeError; a
        `G` whose size is not the number of rows in `roles` a ValueError.
        """
        G = check_gram("CAGrad", G, roles)
        if not len(roles):
            return G.new_zeros(G.shape[:-1])
        u = preference(roles)
        rows = equilibrate(G, roles)
        return u.sign() * (
            u.abs() + _push(rows, u.abs(), self.c, dependence_tolerance(roles.dtype))
        )

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1/T on retain rows, -1/T on forget rows, [R]: the mean from which the direction departs."""
        return preference(roles)

    def __repr__(self) -> str:
        return f"CAGrad(c={self.c})"


def _push(rows: UnitRows, u: Tensor, c: float, tolerance: float) -> Tensor:
    """y ≥ 0 [..., R], a multiple of p: what is added to u.

    Among the d with ⟨g_i, d⟩ ≥ λ for all i let d(λ) = Jᵀ(u + y(λ)) be the nearest to g_0 = Jᵀu: a
    problem of complementarity. n(λ) = ‖d(λ) - g_0‖ increases and is convex, since (λ, d) -> ‖d -
    g_0‖ is; n' = Σy / n. So the largest λ in the ball is where n = c ‖g_0‖; every tangent to n
    meets that height above it, every chord below it.
    """
    b, size = cosines(rows, u)
    x, a = least_norm(rows)
    low, high = _bracket(rows, b, a, norm(rows.E, x), c, tolerance)
    for _round in range(ROUNDS):
        low, high = _narrow(rows.E, b, a, low, high, c)
    x = torch.where(rows.live, _nearest(rows.E, b, a, high), 0.0)
    onto = (c / norm(rows.E, x).clamp(min=TINY)).clamp(max=1.0)  # the ball, after rounding
    return x * onto * size / rows.length


def _nearest(E: Tensor, b: Tensor, a: Tensor, height: Tensor) -> Tensor:
    """Coefficients x [..., R] of d(λ) - g_0 in unit rows, lengths in ‖g_0‖, λ = height · ‖g_0‖ · the shortest row.

    Rows with b - λ a > 1 are slack, as |E x| ≤ n ≤ 1 for λ ≤ 0: cut above that, q is of order 1.
    """
    return complementary(E, (b - height * a).clamp(max=2.0))


def _bracket(
    rows: UnitRows, b: Tensor, a: Tensor, distance: Tensor, c: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Heights between which n = c: from the worst row's at g_0 to 0, or from 0 to what the hull's distance to 0 allows.

    λ ≤ ⟨Jᵀp, d⟩ ≤ ‖Jᵀp‖ (1 + c) ‖g_0‖ for every p. Both 0 where the hull contains 0 and the ball
    holds d(0).
    """
    worst = torch.where(rows.live, b / a, torch.inf).amin(-1, keepdim=True)
    reached = norm(rows.E, _nearest(rows.E, b, a, torch.zeros_like(worst))) >= c
    apart = (distance > tolerance) & ~rows.zero.any(-1, keepdim=True)
    high = torch.where(~reached & apart, (1.0 + c) * distance, 0.0)
    return torch.where(reached, worst, 0.0).minimum(high), high


def _narrow(
    E: Tensor, b: Tensor, a: Tensor, low: Tensor, high: Tensor, c: float
) -> tuple[Tensor, Tensor]:
    """A shorter bracket from n and n' at `POINTS` heights between low and high."""
    # [..., K]
    heights = low + (high - low) * torch.linspace(0.0, 1.0, POINTS, dtype=E.dtype, device=E.device)
    # [..., K, R]
    x = _nearest(E[..., None, :, :], b[..., None, :], a[..., None, :], heights[..., None])
    n = norm(E[..., None, :, :], x)[..., 0]
    below = (n < c).sum(-1, keepdim=True)
    left, right = (below - 1).clamp(min=0), below.clamp(max=POINTS - 1)
    start, end, n_start, n_end = (
        value.gather(-1, at) for value in (heights, n) for at in (left, right)
    )
    chord = start + (end - start) * ((c - n_start) / (n_end - n_start).clamp(min=TINY)).clamp(
        0.0, 1.0
    )
    slope = (x * a[..., None, :]).sum(-1) / n.clamp(min=TINY)
    # n = 0 has none
    tangents = torch.where(n > 1e-12, heights + (c - n) / slope.clamp(min=TINY), torch.inf)
    high = tangents.amin(-1, keepdim=True).minimum(end).maximum(start)
    return chord.minimum(high), high
