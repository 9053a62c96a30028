"""The convex programs of `_programs` for one matrix on the CPU: in numpy, by exchanging rows.

A row is active where its x may be positive, and s = 0 there. Solving for x on the active rows shows
which rows are on the wrong side: active ones with x < 0, others with s < 0. All of them change
sides at once, until none is left: then x ≥ 0, s ≥ 0 and x·s = 0, which is the solution, and the
only one, since M is positive definite. Three to six exchanges are the rule. Where there are many,
one row changes sides at a time, which ends.
"""

from __future__ import annotations

import math

import numpy as np

from mtu_fast.methods._host import Array, LiveRows, Mask

BLOCKS = 12  # rounds in which all rows on the wrong side change it; they may cycle
ROUNDS = 300  # in all; then one row changes at a time, the last, which ends (Murty)
NEWTON = 60  # steps of CAGrad's; seven are the rule
ROUNDING = 1e-13  # of x and s, which are of order 1
CLOSE = 1.0 + 4e-16  # of a radius, to rounding


def complementary(M: Array, q: Array) -> Array | None:
    """x ≥ 0 with s = M x + q ≥ 0 and x·s = 0, of [n]; None where the exchanges do not end.

    Args:
        M: [n, n] positive definite.
        q: [n] of order 1.

    Returns:
        x [n].
    """
    x = np.zeros(len(q))
    active = np.asarray(q < 0)
    for step in range(ROUNDS):
        at = np.nonzero(active)[0]
        found = np.linalg.solve(M[at[:, None], at], -q[at])
        lowest = found @ M[at] + q  # s, and on the active rows x
        lowest[at] = found
        wrong = lowest < -ROUNDING
        if not wrong.any():
            x[at] = np.maximum(found, 0.0)
            return x
        active ^= wrong if step < BLOCKS else _last(wrong)
    return None


def several(M: Array, q: Array) -> Array | None:
    """`complementary` for every q of [K, n] at once: x [K, n]; None where one does not end."""
    x = np.zeros_like(q)
    active = np.asarray(q < 0)
    going = np.flatnonzero(active.any(1))
    active, q = active[going], q[going]
    for step in range(ROUNDS):
        if not len(going):
            return np.maximum(x, 0.0)
        found = _solve_active(M, q, active)
        s = found @ M + q
        wrong = np.where(active, found, s) < -ROUNDING
        left = wrong.any(1)
        x[going[~left]] = found[~left]
        going, q, wrong = going[left], q[left], wrong[left]
        active = active[left] ^ (wrong if step < BLOCKS else _last(wrong))
    return None


def _last(wrong: Mask) -> Mask:
    """The last row alone of those on the wrong side, [..., n]."""
    behind = np.cumsum(wrong[..., ::-1], -1)[..., ::-1]  # how many from here on
    return wrong & (behind == 1)


def _solve_active(M: Array, q: Array, active: Mask) -> Array:
    """x [K, n] with M x = -q on the active rows, and x = 0 elsewhere; the matrices are as small as the most active."""
    size = int(active.sum(1).max())
    first = np.argsort(~active, 1, kind="stable")[:, :size]  # [K, size], active rows before others
    problem = np.arange(len(q))[:, None]
    inside = active[problem, first]
    both = inside[:, :, None] & inside[:, None, :]
    A = np.where(both, M[first[:, :, None], first[:, None, :]], np.eye(size))
    right = np.where(inside, -q[problem, first], 0.0)
    x = np.zeros_like(q)
    x[problem, first] = np.linalg.solve(A, right[..., None])[..., 0]
    return x


def project(rows: LiveRows, u: Array) -> Array | None:
    """argmin ‖Jᵀv‖² over v ≥ u, u [R]: the weights v [R] of the projection of Jᵀu on {d: J d ≥ 0}."""
    b, size = cosines(rows, u)
    x = complementary(rows.E, b)
    if x is None:
        return None
    v = u.copy()
    v[rows.live] += x * size / rows.length
    return v


def project_each(rows: LiveRows, u: Array) -> Array | None:
    """Σ_i of `project` for u_i on row i alone, u [R]: weights [R]."""
    size = u[rows.live] * rows.length
    x = several(rows.E, rows.E)  # the cosines of row i with the others are row i of E
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
    a = rows.length.min() / rows.length
    x = complementary(rows.E + a * a[:, None], -a)
    return None if x is None else (x / (a @ x), a)


def best_worst(rows: LiveRows, c: float, tolerance: float) -> Array | None:
    """CAGrad's weights [R]: of the d in ‖d - g_0‖ ≤ c ‖g_0‖ with the largest λ = min ⟨g_i, d⟩, g_0 the mean row.

    With n(λ) the distance from g_0 to {d: J d ≥ λ}, in units of ‖g_0‖, the largest λ in the ball is
    where n = c. n increases and is convex, so Newton's steps from a λ above come down to it without
    passing it.
    """
    E, u = rows.E, rows.share
    b, size = cosines(rows, u)
    if not size or not c:
        return u
    simplex = _simplex(rows)
    if simplex is None:
        return None
    hull, a = simplex
    apart = 0.0 if rows.zero.any() else _norm(E, hull)
    x = _on_sphere(E, b, a, apart if apart > tolerance else 0.0, c)
    if x is None:
        return None
    reach = _norm(E, x)
    onto = min(1.0, c / reach) if reach else 1.0  # the ball, after rounding
    w = u.copy()
    w[rows.live] += x * onto * size / rows.length
    return w


def _on_sphere(E: Array, b: Array, a: Array, apart: float, c: float) -> Array | None:
    """Coefficients x [n] of d - g_0 with norm c at the largest λ; inside the ball where no λ > 0 can be had.

    `apart` is the distance of the rows' hull from 0; 0 where it contains 0.
    """
    x = complementary(E, b)  # at λ = 0
    if x is None:
        return None
    reach = _norm(E, x)
    if reach >= c:
        return _come_down(E, b, a, 0.0, c)
    if not apart:
        return x
    # λ ≤ ⟨Jᵀp, d⟩ ≤ ‖Jᵀp‖ (1 + c) ‖g_0‖ for every p
    return _come_down(E, b, a, (1.0 + c) * apart, c)


def _come_down(E: Array, b: Array, a: Array, height: float, c: float) -> Array | None:
    """Coefficients x [n] of d - g_0 at the height where its norm is c, from one where it is at least c."""
    for _step in range(NEWTON):
        x = complementary(E, b - height * a)
        if x is None:
            return None
        n = _norm(E, x)
        if not n:
            return None
        below = height + (c - n) * n / (a @ x)
        if n <= c * CLOSE or below >= height:
            return x
        height = float(below)
    return None


def _norm(E: Array, x: Array) -> float:
    """√(xᵀE x)."""
    return math.sqrt(max(float(x @ E @ x), 0.0))
