"""The weights of `bargaining` for one matrix on the CPU, in numpy: Newton's steps until they are short."""

from __future__ import annotations

import numpy as np

from mtu_fast._ops._host_linalg import Array, solve
from mtu_fast.methods._host import LiveRows

SETTLE = 3  # steps at q = 1, where the function is self-concordant
STEPS = 60
SHORT = 1e-9  # of u: the step after one that short is below rounding, as Newton's converge
TRIED = 2.0 ** np.arange(-5, 2)  # step lengths beside the longest, which stays inside u > 0


def fair_weights(rows: LiveRows, a: float, tol: float) -> Array | None:
    """w ≥ 0 [R] with (G w)_i = w_i^(-1/a), as `bargaining.fair_weights`; None where the steps do not end."""
    w = np.zeros(rows.live.shape)
    E = rows.E
    if not len(E):
        return w
    scale = -np.log(rows.length)
    mean = scale.mean()
    # in units of the geometric mean length: powers of lengths stay in range
    scale = scale - mean
    u: Array = np.ones(len(E))
    for step in range(STEPS):
        # q = 1 is a problem without lengths, and a good start for every other
        q = 1.0 if step < SETTLE else 1.0 / a
        if u @ E @ u <= (tol * u.max()) ** 2:
            return w  # the rows cancel: no direction suits them all
        u, change = _newton(E, np.exp((1.0 - q) * scale), u, q)
        if not np.isfinite(change):
            return None
        if step >= SETTLE and change <= SHORT:
            w[rows.live] = u / rows.length * np.exp((a - 1.0) / (a + 1.0) * mean)
            return w
    return None


def _newton(E: Array, b: Array, u: Array, q: float) -> tuple[Array, float]:
    """u after a step of Newton's towards E u = b ∘ u^(-q), and how long the step is beside u."""
    Eu = E @ u
    t = ((b @ u ** (1.0 - q)) / (u @ Eu)) ** (1.0 / (1.0 + q))  # u as a whole first
    u, Eu = t * u, t * Eu
    price = b * u**-q
    # the Hessian of ½ uᵀE u − Σ b u^(1−q) / (1−q)
    H = E + np.diag(q * price / u)
    d = solve(H, price - Eu)
    relative = d / u
    change = float(np.abs(relative).max())
    if change > 1e-3:  # below, the function is a parabola
        d = _step_length(E, u, Eu, price, d, q) * d
    return u + d, change


def _step_length(E: Array, u: Array, Eu: Array, price: Array, d: Array, q: float) -> float:
    """t > 0 with u + t d > 0 at which the derivative along d, which rises with t, is about zero."""
    relative = d / u
    last = 0.99 / max(float((-relative).max()), 1e-3)
    t = np.minimum(TRIED, last)
    moved = 1.0 + t[:, None] * relative  # [K, n]
    value = d @ Eu + t * (d @ E @ d) - moved**-q @ (d * price)
    down = np.flatnonzero(value < 0)
    if not len(down):
        return float(t[0])
    k = down[-1]
    if k + 1 == len(t) or value[k + 1] == value[k]:
        return float(t[k])
    # the secant through the two heights beside the zero
    return float(t[k] + (t[k + 1] - t[k]) * value[k] / (value[k] - value[k + 1]))
