"""The convex programs of `_programs` for one matrix on the CPU: in numpy, by exchanging rows."""

from __future__ import annotations

import math

import numpy as np
import torch

from mtu_fast._ops._host_linalg import Array
from mtu_fast._ops.complementary import complementary as exchange
from mtu_fast.methods._host import LiveRows

NEWTON = 60  # steps of CAGrad's; seven are the rule
CLOSE = 1.0 + 4e-16  # of a radius, to rounding


def complementary(M: Array, q: Array, dependent: bool) -> Array | None:
    """x ≥ 0 with s = M x + q ≥ 0 and x·s = 0, all [n] and M [n, n]; None where the exchanges do not end."""
    x = several(M, q[None], dependent)
    return None if x is None else x[0]


def several(M: Array, q: Array, dependent: bool) -> Array | None:
    """The same for every q of [K, n], x [K, n]; None where they do not end for one of them."""
    x, ended = exchange.unchecked(torch.from_numpy(M), torch.from_numpy(q), dependent)
    found: Array = x.numpy()
    return found if ended.numpy().all() else None


def project(rows: LiveRows, u: Array) -> Array | None:
    """argmin ‖Jᵀv‖² over v ≥ u, u [R]: the weights v [R] of the projection of Jᵀu on {d: J d ≥ 0}."""
    b, size = cosines(rows, u)
    x = complementary(rows.E, b, rows.dependent)
    if x is None:
        return None
    # x weighs unit rows and a g of length 1: v = u + x ‖g‖ / length
    v = u.copy()
    v[rows.live] += x * size / rows.length
    return v


def project_each(rows: LiveRows, u: Array) -> Array | None:
    """Σ_i of `project` for u_i on row i alone, u [R]: weights [R]."""
    size = u[rows.live] * rows.length
    # the cosines of row i with the others are row i of E
    x = several(rows.E, rows.E, rows.dependent)
    if x is None:
        return None
    v = u.copy()
    v[rows.live] += size @ x / rows.length
    return v


def cosines(rows: LiveRows, u: Array) -> tuple[Array, float]:
    """Cosines [n] of g = Σ u_i g_i with the unit rows, u [R], and ‖g‖."""
    scaled = u[rows.live] * rows.length
    product = rows.E @ scaled
    size = math.sqrt(max(float(scaled @ product), 0.0))
    return product / (size or 1.0), size


def least_norm(rows: LiveRows) -> Array | None:
    """Weights w [R] ≥ 0 of sum 1 with the least ‖Jᵀw‖; zero rows share them where there are any."""
    if rows.zero.any():
        return rows.zero / rows.zero.sum()
    found = _simplex(rows)
    if found is None:
        return None
    x, a = found
    w = np.zeros(rows.live.shape)
    w[rows.live] = a * x
    return w


def _simplex(rows: LiveRows) -> tuple[Array, Array] | None:
    """x and a [n]: Σ x_i (unit row i) has the least norm over x ≥ 0 with a·x = 1, a = shortest length / length."""
    if not len(rows.length):
        return rows.length, rows.length
    # Σ w = 1 for w_i = x_i / length_i, scaled to be of order 1
    a = rows.length.min() / rows.length
    # M = E + a aᵀ and q = -a, as in `_programs`
    x = complementary(rows.E + a * a[:, None], -a, rows.dependent)
    return None if x is None else (x / (a @ x), a)


def best_worst(rows: LiveRows, c: float, tolerance: float) -> Array | None:
    """CAGrad's weights [R]: of the d in ‖d - g_0‖ ≤ c ‖g_0‖ with the largest λ = min ⟨g_i, d⟩, g_0 the mean row.

    With n(λ) the distance from g_0 to {d: J d ≥ λ}, in units of ‖g_0‖, the largest λ in the ball is
    where n = c. n increases and is convex, so Newton's steps from a λ above come down to it without
    passing it.
    """
    u = rows.share
    b, size = cosines(rows, u)
    if not size or not c:
        return u
    simplex = _simplex(rows)
    if simplex is None:
        return None
    hull, a = simplex
    apart = 0.0 if rows.zero.any() else _norm(rows.E, hull)
    x = _on_sphere(rows, b, a, apart if apart > tolerance else 0.0, c)
    if x is None:
        return None
    reach = _norm(rows.E, x)
    onto = min(1.0, c / reach) if reach else 1.0  # the ball, after rounding
    w = u.copy()
    w[rows.live] += x * onto * size / rows.length
    return w


def _on_sphere(rows: LiveRows, b: Array, a: Array, apart: float, c: float) -> Array | None:
    """Coefficients x [n] of d - g_0 with norm c at the largest λ; inside the ball where no λ > 0 can be had.

    `apart` is the distance of the rows' hull from 0; 0 where it contains 0.
    """
    # the KKT conditions of min ‖Jᵀ(u + x)‖ over x ≥ 0: s = G (u + x)
    x = complementary(rows.E, b, rows.dependent)  # at λ = 0
    if x is None:
        return None
    reach = _norm(rows.E, x)
    if reach >= c:
        return _come_down(rows, b, a, 0.0, c)
    if not apart:
        return x
    # λ ≤ ⟨Jᵀp, d⟩ ≤ ‖Jᵀp‖ (1 + c) ‖g_0‖ for every p
    return _come_down(rows, b, a, (1.0 + c) * apart, c)


def _come_down(rows: LiveRows, b: Array, a: Array, height: float, c: float) -> Array | None:
    """Coefficients x [n] of d - g_0 at the height where its norm is c, from one where it is at least c."""
    for _step in range(NEWTON):
        x = complementary(rows.E, b - height * a, rows.dependent)
        if x is None:
            return None
        n = _norm(rows.E, x)
        if not n:
            return None
        # Newton: n(λ)' = a·x / n
        below = height + (c - n) * n / (a @ x)
        if n <= c * CLOSE or below >= height:
            return x
        height = float(below)
    return None


def _norm(E: Array, x: Array) -> float:
    """√(xᵀE x)."""
    return math.sqrt(max(float(x @ E @ x), 0.0))
