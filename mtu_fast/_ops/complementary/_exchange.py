"""x ≥ 0, s = M x + q ≥ 0, x·s = 0 for one small M on the CPU: in numpy, by exchanging rows.

`csrc/cpu/complementary.cpp` does the same, problem by problem.

A row is active where its x may be positive, and s = 0 there. Solving for x on the active rows shows
which rows are on the wrong side: active ones with x < 0, others with s < 0. All of them change
sides at once, until none is left: then x ≥ 0, s ≥ 0 and x·s = 0, which is the solution, and the
only one where M is positive definite. Three to six exchanges are the rule. Where they do not make
the wrong rows fewer, ½ xᵀM x + qᵀx is brought down one row at a time, which ends.

A singular M is solved with a ridge ρ on its diagonal, and the ridge is taken back by repetition:
M x + ρ (x - x') + q = s with the x' of the time before, whose fixed points solve the problem
without it (the proximal point method). The first time has a high ridge, whose exchanges are few and
end with nearly the active rows of the solution; all others a low one, which little is taken back of.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtu_fast._ops._host_linalg import Array, Mask, inv, solve

Index = npt.NDArray[np.intp]

PATIENCE = 5  # exchanges that need not make the wrong rows fewer
DESCENTS = 5  # solutions on the way down, beside the number of rows
SMALL = 24  # rows: fewer are solved for as they are, without the inverse
ROUNDING = 1e-13  # of x and s, which are of order 1
RESIDUAL = 1e-12  # of s on active rows, beside the largest x: more is no solution
FIRST, LATER = 1e-2, 1e-8  # ridges: exchanges are few; far above rounding
REPEATS = 40  # times; three to five are the rule
RESTS = 2e-15  # ρ |x - x'|, what the ridge leaves in s, beside the largest x


def each(M: Array, q: Array, dependent: bool = False) -> tuple[Array, Mask]:
    """x ≥ 0 with s = M x + q ≥ 0 and x·s = 0 for every q, and for which of them the exchanges end.

    Args:
        M: [n, n] positive semidefinite.
        q: [K, n] of order 1.
        dependent: whether M is too near a singular one to do without a ridge.

    Returns:
        x [K, n], 0 where they do not end, and [K] bool.
    """
    x, active = np.zeros_like(q), np.asarray(q < 0)
    ridge = FIRST if dependent else 0.0
    ended = np.zeros(len(q), dtype=bool)
    together = len(q) > 1
    if together:
        ended = _together(M, q, x, active, ridge)
        # with a ridge, exchanges from these rows have been tried
        ridge = LATER if dependent else 0.0
    for i in np.flatnonzero(~ended):
        downhill = together and dependent
        found = _alone(M, q[i], x[i], active[i], ridge, downhill)
        ended[i] = found is not None
        x[i] = 0.0 if found is None else found
    return x, ended


def _alone(
    M: Array, q: Array, x: Array, active: Mask, ridge: float, downhill: bool = False
) -> Array | None:
    """The solution [n] with one ridge, then the low one, from an x' and some rows that may be active.

    None if that does not end. `downhill`: the first time goes down at once.
    """
    for _time in range(REPEATS):
        A = M + ridge * np.eye(len(q)) if ridge else M
        right = q - ridge * x
        found = None if downhill else _exchanged(A, right, active)
        if found is None:
            found = _descended(A, right, x)
        if found is None:
            return None
        downhill = False
        before = x
        x, active = found
        if _at_rest(ridge, before, x):
            return x
        ridge = LATER
    return None


def _together(M: Array, q: Array, x: Array, active: Mask, ridge: float) -> Mask:
    """Solves for [K, n] into x and active as far as all goes well; which of the K problems are done."""
    rests = np.zeros(len(q), dtype=bool)
    going = np.arange(len(q))
    for _time in range(REPEATS):
        A = M + ridge * np.eye(len(M))
        # with a ridge the inverse is too inexact for what is asked of s
        inverse = inv(A) if len(A) >= SMALL and not ridge else None
        found, sides, ended = _each(A, inverse, q[going] - ridge * x[going], active[going])
        done = ended & _at_rest(ridge, x[going], found)
        x[going[ended]], active[going[ended]] = found[ended], sides[ended]
        rests[going[done]] = True
        going = going[ended & ~done]
        if not len(going):
            break
        ridge = LATER
    return rests


def _at_rest(ridge: float, before: Array, x: Array) -> Mask:
    """Whether the ridge leaves nothing but rounding, [...] of x [..., n]."""
    change = ridge * np.abs(x - before).max(-1, initial=0.0)
    return np.asarray(change <= RESTS * np.maximum(1.0, x.max(-1, initial=0.0)))


def _exchanged(M: Array, q: Array, active: Mask) -> tuple[Array, Mask] | None:
    """The solution [n] and its active rows by exchanges, from some rows that may be active."""
    fewest, patience = len(q) + 1, PATIENCE
    while patience:
        at = np.nonzero(active)[0]
        found = solve(M[at[:, None], at], -q[at])
        lowest = found @ M[at] + q  # s, and on the active rows x
        residual = np.abs(lowest[at])
        lowest[at] = found
        wrong = lowest < -ROUNDING
        count = int(np.count_nonzero(wrong))
        if not count:
            x = np.zeros_like(q)
            x[at] = np.maximum(found, 0.0)
            holds = residual.max(initial=0.0) <= RESIDUAL * max(1.0, x.max(initial=0.0))
            return (x, active) if holds else None
        patience = PATIENCE if count < fewest else patience - 1
        fewest = min(fewest, count)
        # all wrong rows change sides at once, which mostly ends in a few rounds
        active = active ^ wrong
    return None


def _descended(M: Array, q: Array, x: Array) -> tuple[Array, Mask] | None:
    """The solution [n] and its active rows: the row with the least s joins, until none is below 0.

    From any x ≥ 0. After Lawson and Hanson, "Solving Least Squares Problems", chapter 23: a row
    whose x comes to 0 on the way to the solution on the active rows leaves.
    """
    x, active = x.copy(), x > 0
    for _step in range(DESCENTS * len(q)):
        at = np.nonzero(active)[0]
        found = solve(M[at[:, None], at], -q[at])
        down = found < -ROUNDING
        if down.any():
            _leave(x, active, at, found, down)
            continue
        x[at] = np.maximum(found, 0.0)
        s = x @ M + q
        if np.abs(s[at]).max(initial=0.0) > RESIDUAL * max(1.0, x.max()):
            return None
        s[at] = 0.0
        lowest = int(s.argmin())
        if s[lowest] >= -ROUNDING:
            return x, active
        active[lowest] = True
    return None


def _leave(x: Array, active: Mask, at: Index, found: Array, down: Mask) -> None:
    """x goes towards `found` on the rows `at` as far as it stays ≥ 0, and the rows that stop it leave."""
    share = np.full(len(at), np.inf)
    share[down] = x[at[down]] / (x[at[down]] - found[down])
    least = share.min()
    x[at] += least * (found - x[at])
    stopped = at[share <= least]
    x[stopped] = 0.0
    active[stopped] = False
    np.maximum(x, 0.0, out=x)


def _each(M: Array, inverse: Array | None, q: Array, active: Mask) -> tuple[Array, Mask, Mask]:
    """`_exchanged` for every q and active of [K, n] at once, and for which of [K] it has ended."""
    x, sides, ended = np.zeros_like(q), active.copy(), np.zeros(len(q), dtype=bool)
    going = np.arange(len(q))
    fewest, patience = np.full(len(q), len(M) + 1), np.full(len(q), PATIENCE)
    while len(going):
        found, s = _solve_active(M, inverse, q, active)
        wrong = np.where(active, found, s) < -ROUNDING
        count = wrong.sum(1)
        done = count == 0
        at = going[done]
        x[at], sides[at] = np.maximum(found[done], 0.0), active[done]
        residual = np.where(active, np.abs(s), 0.0).max(1)
        ended[at] = (residual <= RESIDUAL * np.maximum(1.0, found.max(1)))[done]
        patience = np.where(count < fewest, PATIENCE, patience - 1)
        fewest = np.minimum(fewest, count)
        left = ~done & (patience > 0)
        going, q, active = going[left], q[left], active[left] ^ wrong[left]
        fewest, patience = fewest[left], patience[left]
    return x, sides, ended


def _solve_active(M: Array, inverse: Array | None, q: Array, active: Mask) -> tuple[Array, Array]:
    """x and s = M x + q of [K, n], with s = 0 on the active rows and x = 0 elsewhere.

    Solved on the active rows or, by the inverse, on the others, whichever are fewer.
    """
    if inverse is None:
        x = _on_rows(M, q, active)
        return x, x @ M + q
    many = 2 * active.sum(1) > len(M)
    x = np.zeros_like(q)
    few = ~many
    if few.any():
        x[few] = _on_rows(M, q[few], active[few])
    if many.any():
        right, inside = q[many], active[many]
        found = _by_inverse(inverse, right, inside)
        # the inverse is as exact as M's condition lets it be; what is left of s corrects that
        left = np.where(inside, found @ M + right, 0.0)
        x[many] = found + _by_inverse(inverse, left, inside)
    return x, x @ M + q


def _by_inverse(inverse: Array, q: Array, active: Mask) -> Array:
    """x [K, n] from s on the other rows: x = M⁻¹ (s - q) is 0 there."""
    s = _on_rows(inverse, -(q @ inverse), ~active)
    return np.where(active, (s - q) @ inverse, 0.0)


def _on_rows(M: Array, q: Array, rows: Mask) -> Array:
    """x [K, n] with M x = -q on these rows, and x = 0 elsewhere; the matrices are as small as the most rows."""
    x = np.zeros_like(q)
    size = int(rows.sum(1).max())
    if not size:
        return x
    first = np.argsort(~rows, 1, kind="stable")[:, :size]  # [K, size], these rows before others
    problem = np.arange(len(q))[:, None]
    inside = rows[problem, first]
    both = inside[:, :, None] & inside[:, None, :]
    A = np.where(both, M[first[:, :, None], first[:, None, :]], np.eye(size))
    right = np.where(inside, -q[problem, first], 0.0)
    x[problem, first] = solve(A, right)
    return x
