"""The weights of alpha-fair bargaining: G w = w^(-1/a), w > 0, by Newton's method on the whole batch at once.

With C = D G D of unit diagonal and w = D u this is C u = b ∘ u^(-q), b = D^(1-q), q = 1/a: the
point where the convex function ½ uᵀCu - Σ b u^(1-q) / (1-q) (for a = 1: - Σ log u) is least.
Newton's steps go down that function, and q moves from 1 to 1/a on the way, since the function is
self-concordant at 1 only. On a GPU the number of steps is fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast._later import is_host
from mtu_fast.methods._fair_host import fair_weights as fair_weights_on_host
from mtu_fast.methods._gram import UnitRows, times, unit_rows
from mtu_fast.methods._host import solved
from mtu_fast.methods.roles import Roles, signs

# iterations at q = 1, towards 1/a, and there; SETTLE + POLISH where a = 1
SETTLE, TRAVEL, POLISH = 4, 24, 20
SEARCH = -5, 11  # powers of two tried for the length of a step
LARGEST = 1e16  # of u, where the function has no least point
RESTS = 1e-12  # change of u beside u after which a matrix on the CPU needs no more steps
MANY, FEW = 16, 24  # matrices and their rows from which on they are solved together


def fair_weights(G: Tensor, roles: Roles, a: float, tol: float) -> Tensor:
    """w with s ∘ w ≥ 0 for the signs s of the rows, and s (G w)_i = (s w)_i^(-1/a) on rows that are not zero.

    Zero and subspace rows have w = 0. Where a non-negative combination of the unit rows is shorter
    than `tol` times its largest coefficient, no direction suits all rows and no w exists: w = 0
    there.

    Args:
        G: [..., R, R] float64.
        roles: what the rows are.
        a: exponent, positive.
        tol: length below which a combination counts as zero.

    Returns:
        w [..., R].
    """
    if not len(roles):
        return G.new_zeros(G.shape[:-1])

    def otherwise(G: Tensor) -> Tensor:
        sign = signs(roles)
        return sign * _iterated(unit_rows(G, sign), a, tol)

    if len(roles) < FEW and G[..., 0, 0].numel() > MANY:
        return otherwise(G)
    return solved(G, roles, lambda rows: fair_weights_on_host(rows, a, tol), otherwise)


def _iterated(rows: UnitRows, a: float, tol: float) -> Tensor:
    """The weights [..., R] of signed rows by a fixed number of steps on their device."""
    C, live = rows.E, rows.live
    length = torch.where(live, -rows.length.log(), 0.0)
    # in units of the geometric mean length, so that powers of lengths stay in range
    mean = length.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
    length = torch.where(live, length - mean, 0.0)
    u = torch.ones_like(length)
    cancel = torch.zeros_like(mean, dtype=torch.bool)
    for q in _exponents(1.0 / a):
        before = u
        u = _newton(C, ((1.0 - q) * length).exp(), u, q)
        # one such u is proof; what the iteration does afterwards is not
        cancel = cancel | _cancels(C, u, tol)
        if q == 1.0 / a and _at_rest(before, u, cancel):
            break
    w = u / rows.length * ((a - 1.0) / (a + 1.0) * mean).exp()  # b was divided by exp((1 - q) mean)
    return torch.where(cancel, 0.0, w * live)  # what is not a number stays so


def _at_rest(before: Tensor, u: Tensor, cancel: Tensor) -> bool:
    """Whether no matrix on the CPU needs another step; a GPU would be waited for."""
    if not is_host(u.device):
        return False
    rests = ((u - before).abs() <= RESTS * u).all(-1, keepdim=True)
    return bool((rests | cancel).all())


def _exponents(q: float) -> list[float]:
    """The q of every iteration: 1, then evenly in the logarithm to its value, then its value."""
    if q == 1.0:
        return [1.0] * (SETTLE + POLISH)
    travel = [q ** (k / TRAVEL) for k in range(1, TRAVEL)]
    return [1.0] * SETTLE + travel + [q] * POLISH


def _cancels(C: Tensor, u: Tensor, tol: float) -> Tensor:
    """Whether the combination of the unit rows is shorter than `tol` times its largest coefficient; [..., 1]."""
    square = (u * times(C, u)).sum(-1, keepdim=True)
    return square <= (tol * u.amax(-1, keepdim=True)) ** 2


def _newton(C: Tensor, b: Tensor, u: Tensor, q: float) -> Tensor:
    """One step: u scaled as a whole to where the function is least, then the Newton direction."""
    Cu = times(C, u)
    quadratic = (u * Cu).sum(-1, keepdim=True)
    linear = (b * u ** (1.0 - q)).sum(-1, keepdim=True)
    # the least of t²/2 uᵀC u - Σ b (t u)^(1-q)/(1-q): t^(1+q) = linear / quadratic
    t = (linear / quadratic.clamp(min=1e-30)) ** (1.0 / (1.0 + q))
    # the best multiple of u first: Newton then converges from any scale
    u, Cu = t * u, t * Cu
    price = b * u**-q
    d = _solve(C + torch.diag_embed(q * price / u), price - Cu)
    # a step that could not be solved for is none
    d = torch.where(d.isfinite(), d, torch.zeros_like(d))
    return (u + _step_length(C, b, u, Cu, d, q) * d).clamp(max=LARGEST)


def _solve(H: Tensor, rhs: Tensor) -> Tensor:
    """H⁻¹ rhs for a positive definite H, by Cholesky after scaling to unit diagonal; nothing is checked."""
    # D^(-1/2) H D^(-1/2): the diagonal spans many orders where some u is nearly 0
    scale = H.diagonal(dim1=-2, dim2=-1).rsqrt()
    ridge = torch.diag_embed(torch.full_like(rhs, 1e-15 * H.shape[-1]))
    L, _ = torch.linalg.cholesky_ex(H * scale[..., None] * scale[..., None, :] + ridge)
    return scale * torch.cholesky_solve((scale * rhs)[..., None], L)[..., 0]


def _step_length(C: Tensor, b: Tensor, u: Tensor, Cu: Tensor, d: Tensor, q: float) -> Tensor:
    """t > 0 at which the derivative along d is about zero, u + t d staying positive; [..., 1].

    The derivative rises with t. Powers of two bracket its zero, and the secant through the bracket
    is near enough: where Newton's method converges, the derivative is a straight line with its zero
    at t = 1.
    """
    level = (d * Cu).sum(-1, keepdim=True)
    slope = (d * times(C, d)).sum(-1, keepdim=True)
    relative = d / u
    pull = d * b * u**-q
    # u + t d must stay positive
    last = 0.99 / (-relative).amax(-1, keepdim=True).clamp(min=1e-3)
    # [..., K], tried at once: a GPU has no time for a line search
    t = torch.minimum(2.0 ** torch.arange(*SEARCH, dtype=u.dtype, device=u.device), last)
    moved = 1.0 + t[..., None] * relative[..., None, :]  # [..., K, R]
    value = level + t * slope - (pull[..., None, :] * moved**-q).sum(-1)
    start, down = level - pull.sum(-1, keepdim=True), value < 0
    low = torch.where(down, t, 0.0).amax(-1, keepdim=True)
    high = torch.where(down, last, t).amin(-1, keepdim=True)
    below = torch.where(down, value, start).amax(-1, keepdim=True)
    above = torch.where(down, torch.inf, value).amin(-1, keepdim=True)
    secant = low + (high - low) * below / (below - above)
    return torch.where(above.isfinite() & secant.isfinite(), secant, low)
