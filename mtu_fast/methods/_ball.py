"""CAGrad's ball around the mean row, batched and on its device: the best worst gain by a bracket that closes on it."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast.methods._gram import UnitRows, norm
from mtu_fast.methods._programs import TINY, complementary, cosines, least_norm

# a bracket shrinks at least 7 times a round, quadratically once it holds no kink
POINTS, ROUNDS = 8, 6


def push(rows: UnitRows, u: Tensor, c: float, tolerance: float) -> Tensor:
    """y ≥ 0 [..., R], a multiple of p: what is added to u.

    Among the d with ⟨g_i, d⟩ ≥ λ for all i let d(λ) = Jᵀ(u + y(λ)) be the nearest to g_0 = Jᵀu: a
    problem of complementarity. n(λ) = ‖d(λ) - g_0‖ increases and is convex, since (λ, d) -> ‖d -
    g_0‖ is; n' = Σy / n. So the largest λ in the ball is where n = c ‖g_0‖; every tangent to n
    meets that height above it, every chord below it.
    """
    b, size = cosines(rows, u)
    x, a = least_norm(rows)
    # n(low) ≤ c ≤ n(high) from here on
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
    # [..., K]: all heights at once, as one batch of problems
    heights = low + (high - low) * torch.linspace(0.0, 1.0, POINTS, dtype=E.dtype, device=E.device)
    # [..., K, R]
    x = _nearest(E[..., None, :, :], b[..., None, :], a[..., None, :], heights[..., None])
    n = norm(E[..., None, :, :], x)[..., 0]
    below = (n < c).sum(-1, keepdim=True)
    left, right = (below - 1).clamp(min=0), below.clamp(max=POINTS - 1)
    start, end, n_start, n_end = (
        value.gather(-1, at) for value in (heights, n) for at in (left, right)
    )
    # n is convex: the chord lies above it and meets c too early, a tangent below it and too late
    chord = start + (end - start) * ((c - n_start) / (n_end - n_start).clamp(min=TINY)).clamp(
        0.0, 1.0
    )
    slope = (x * a[..., None, :]).sum(-1) / n.clamp(min=TINY)
    # n = 0 has none
    tangents = torch.where(n > 1e-12, heights + (c - n) / slope.clamp(min=TINY), torch.inf)
    # the lowest of the tangents' crossings, all of which are above it
    high = tangents.amin(-1, keepdim=True).minimum(end).maximum(start)
    return chord.minimum(high), high
