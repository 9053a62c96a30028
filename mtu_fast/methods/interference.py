"""Interference-aware unlearning: ascend inside the target tasks' subspace, orthogonally to every retain row."""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mtu_fast._arguments import MOST, check_one_of, check_positive, check_share, check_whole
from mtu_fast._later import Later, runs_behind
from mtu_fast._ops.gram_schmidt import effective_rank, solve, whiten
from mtu_fast.methods._arguments import (
    check_fraction,
    check_gram,
    check_granularity,
)
from mtu_fast.methods._gram import norm, times
from mtu_fast.methods.base import Constraint, Granularity, Method, dependence_tolerance
from mtu_fast.methods.roles import (
    FORGET,
    MEMORY,
    RETAIN,
    SUBSPACE,
    Roles,
    mean_weights,
    retain_less_forget,
)

Order = Literal["joint", "project-first", "orthogonalize-first"]
Protected = Literal["all", "target"]
ORDERS: tuple[Order, ...] = get_args(Order)
CHECK_EVERY = 50  # calls between looks at the ranks, which wait for the device
# length, of a kept row scaled to length one, below which it adds no direction to the subspace
STALE = 1e-3
RIDGED = 1e-12  # a ridge leaves no dependent rows


class Interference(NamedTuple):
    """What a call of `InterferenceAware` made of the rows; all but the weights `[...]`, one for each block.

    weights: w [..., R]. dimension: K of the subspace. rank: of the retain rows seen in it, B = J_r
    Uᵀ. share: ‖d‖ / ‖g_f‖, how much of the mean forget gradient is left (NaN without forget rows).
    """

    weights: Tensor
    dimension: Tensor
    rank: Tensor
    share: Tensor


@dataclass
class _Calls:
    """Calls of a method so far, and a look at one of them whose outcome is still on its way from the device."""

    count: int = 0
    look: tuple[Interference, Later] | None = None


@dataclass(frozen=True)
class InterferenceAware(Method):
    """Direction alpha r - (1 - alpha) d, d = Uᵀ(I - Bᵀ(B Bᵀ)⁺B) U g_f with B = J_r Uᵀ: inside span(U), across J_r.

    r and g_f are the mean retain and forget gradients (per task, summed over tasks), J_r the retain
    rows, U an orthonormal basis of the rows of kind SUBSPACE: gradients of the target tasks kept
    from earlier batches, see `mtu_fast.Subspace`. The target tasks are those with forget rows.
    Without rows of kind SUBSPACE, U is the whole space, and the method is OrthoGrad. Without forget
    rows the weights are alpha r. Rows of an `mtu_fast.Memory` are constraints as the retain rows are.

    K, the dimension of U, must exceed the rank of B, or nothing is left of g_f: a warning then
    names both, and the ways out. They are looked at in the first call and every 50 calls; on a GPU
    the warning comes in a later call, once they are known.

    Args:
        alpha: weight of the retain gradient, in [0, 1].
        order: "joint": d is in the span and orthogonal to every retain row. "project-first":
            orthogonalised after the projection, so orthogonal, but partly outside the span.
            "orthogonalize-first": projected last, so in the span, with a residue on retain rows.
        retain: "all" retain rows are constraints, or those of the "target" tasks only; the others
            are then unprotected.
        energy: share of Σσ² of the subspace rows that U must hold, in (0, 1]; 1 keeps all that is
            above rounding.
        rank: at most so many dimensions of U; None for no limit.
        ridge: λ ≥ 0 of a soft constraint c ← (I + BᵀB/μ)⁻¹ c in place of the exact one, with μ = λ
            · mean ‖B_i‖²; order "joint" only.
        granularity: "global", "layer" or "tensor": each block has a subspace and constraints of its
            own.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of range or unknown.

    Source: our reading of "interference-aware multi-task unlearning", arXiv 2605.19042, of which
    the abstract was
    available: that there are a task-aware gradient projection and an instance-level
    orthogonalisation is the paper's; how the subspace is made, its rank, the order and the joint
    solve are ours.
    """

    alpha: float = 0.5
    _: KW_ONLY
    order: Order = "joint"
    retain: Protected = "all"
    energy: float = 1.0
    rank: int | None = None
    ridge: float = 0.0
    granularity: Granularity = "global"
    _calls: _Calls = field(default_factory=_Calls, init=False, repr=False, compare=False)
    needs_subspace = True
    takes_memory = True
    averages_forget = True

    def __post_init__(self) -> None:
        name = "InterferenceAware"
        check_fraction(name, "alpha", self.alpha)
        check_one_of(f"{name}: order", self.order, ORDERS)
        check_one_of(f"{name}: retain", self.retain, get_args(Protected))
        check_share(f"{name}: energy", self.energy)
        if self.rank is not None:
            check_whole(f"{name}: rank", self.rank, 1, MOST)
        check_positive(f"{name}: ridge", self.ridge, zero=True)
        if self.ridge and self.order != "joint":
            raise ValueError(
                f"InterferenceAware: ridge is {self.ridge} with order {self.order!r}; it softens order='joint' only."
            )
        check_granularity(name, self.granularity)

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R]; errors and warnings as in the class."""
        found = self.measure(G, roles)
        self._look(found)
        self._calls.count += 1
        return found.weights

    def _look(self, found: Interference) -> None:
        """Warn where nothing is left, every so many calls; on a GPU in a later call, once that is known."""
        calls = self._calls
        if calls.count % CHECK_EVERY == 0 and self.order == "joint" and not self.ridge:
            if not runs_behind(found.weights.device):
                _warn_if_nothing_is_left(found)
            elif not calls.look:
                # the answer is read in a later call: to ask now would stop the device
                calls.look = found, Later(_squeezed(found).any())
        elif calls.look and calls.look[1].is_there:
            if calls.look[1].value:
                _warn_if_nothing_is_left(calls.look[0])
            calls.look = None

    def measure(self, G: Tensor, roles: Roles) -> Interference:
        """The weights with the ranks behind them.

        A `G` that is no floating tensor, or rows of a dtype without a tolerance, is a TypeError; a
        `G` whose size is not the number of rows in `roles` a ValueError.
        """
        G = check_gram("InterferenceAware", G, roles)
        tol = dependence_tolerance(roles.dtype)
        kept = roles.kind == SUBSPACE
        constraint = self._constraints(roles)
        f = mean_weights(roles, FORGET).expand(G.shape[:-1])
        W, dimension, seen, B = self._inside(G, kept, constraint, tol)
        across, own_rank = _across(G, f, constraint, tol)
        if self.order == "joint":
            # seenᵀ f = U g_f, the coordinates of the mean forget gradient
            inside = times(W, _remove(B, times(seen.mT, f), tol, self.ridge))
        elif self.order == "project-first":
            inside = _across(G, times(W, times(seen.mT, f)), constraint, tol)[0]
        else:
            inside = times(W, times(seen.mT, across))
        # chosen on the device: to ask would be to wait
        bare = ~kept.any()  # no subspace is known: the whole space
        d = torch.where(bare, across, inside)
        rank = torch.where(bare, own_rank, effective_rank(B @ B.mT, tol))
        weights = self.alpha * mean_weights(roles, RETAIN) - (1.0 - self.alpha) * d
        return Interference(weights, dimension, rank, (norm(G, d) / norm(G, f))[..., 0])

    def constraint(self, G: Tensor, roles: Roles, w: Tensor) -> Constraint | None:
        """d = w - alpha r is orthogonal to the retain rows, and a correction of order "joint" stays in the span.

        None where d keeps a residue on retain rows by definition: order "orthogonalize-first", and
        with a ridge. Of order "joint" the constraint is refined alone: where d lies within it keeps
        the Gram's error times cond(B).
        """
        kept = roles.kind == SUBSPACE
        active = self._constraints(roles)
        tol = dependence_tolerance(roles.dtype)
        part = w - self.alpha * mean_weights(roles, RETAIN)
        if self.order == "project-first" or not bool(kept.any()):
            return Constraint(part, active, G, tol)
        if self.order == "orthogonalize-first" or self.ridge:
            return None
        W, _, _, B = self._inside(G, kept, active, tol)
        return Constraint(part, active, B @ B.mT, tol, lift=W @ B.mT)

    def outside(self, roles: Roles) -> Tensor:
        """Weights alpha r - (1 - alpha) f, [R]: the weights before the projections."""
        return retain_less_forget(roles, self.alpha)

    def _inside(
        self, G: Tensor, kept: Tensor, constraint: Tensor, tol: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights W of the basis U, its dimension, all rows in its coordinates, and B, the constraint rows there."""
        W, dimension = basis_weights(G * (kept[:, None] & kept), tol, self.energy, self.rank)
        # J Uᵀ = J Jᵀ W: no row is ever needed itself
        seen = G @ W  # [..., R, K]
        return W, dimension, seen, _constraining(seen, G, constraint, tol)

    def _constraints(self, roles: Roles) -> Tensor:
        """The retain rows, of this step and in memory, that d must be orthogonal to, [R] bool."""
        retain = (roles.kind == RETAIN) | (roles.kind == MEMORY)
        if self.retain == "all":
            return retain
        # a task with a forget row is a target
        forgets = (roles.kind == FORGET).to(torch.float64)
        target = forgets.new_zeros(len(roles.tasks)).index_add(0, roles.task, forgets) > 0
        return retain & target[roles.task]


def basis_weights(
    G: Tensor, tol: float, energy: float = 1.0, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """W [..., R, R] with Wᵀ G W = diag(1 or 0), its columns the weights of an orthonormal basis, and the dimension.

    All that the rows span, by pivoted Cholesky; or, where `energy` or `rank` cut it, the leading
    eigenvectors: the fewest with Σ λ_i ≥ energy · Σ λ, at most `rank`. Directions shorter than
    STALE (or `tol`, if larger) do not count: beyond it the weights amplify the rounding of the
    rows, and rows kept from other steps say no more than that.

    Args:
        G: Gram matrix of the subspace rows [..., R, R], float64, zeros elsewhere.
        tol: what `dependence_tolerance` gives for the rows.
        energy: share of the sum of eigenvalues, in (0, 1].
        rank: the most dimensions, or None.

    Returns:
        W, and the dimension [...] int64.
    """
    tol = max(tol, STALE)
    if energy == 1.0 and rank is None:
        # T G Tᵀ is the identity on what is kept: the rows of T are weights of the basis
        T, kept = whiten(G, tol)
        return T.mT, kept.sum(-1)
    values, vectors = torch.linalg.eigh(G)
    values, vectors = values.flip(-1), vectors.flip(-1)  # largest first
    # an eigenvector is needed where those before it hold too little
    before = values.cumsum(-1) - values
    kept = (values > tol * tol * values[..., :1]) & (before < energy * values.sum(-1, keepdim=True))
    if rank is not None:
        kept &= torch.arange(values.shape[-1], device=G.device) < rank
    # λ^(-1/2): Wᵀ G W = Λ^(-1/2) Λ Λ^(-1/2) = 1
    return vectors * torch.where(kept, values.rsqrt(), 0.0)[..., None, :], kept.sum(-1)


def _across(G: Tensor, w: Tensor, constraint: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Weights of the part of Jᵀ w that is orthogonal to the constraint rows, and their rank."""
    x, rank = solve(G, times(G, w), constraint, tol)
    return w - x, rank


def _constraining(seen: Tensor, G: Tensor, constraint: Tensor, tol: float) -> Tensor:
    """B [..., R, K]: the constraint rows in the coordinates of U; zero where they have nothing there but rounding."""
    length = G.diagonal(dim1=-2, dim2=-1)[..., None]
    # a row outside the span has rounding there, which is no constraint
    there = seen.square().sum(-1, keepdim=True) > tol * tol * length
    return torch.where(there, seen, 0.0) * constraint[:, None]


def _remove(B: Tensor, c: Tensor, tol: float, ridge: float) -> Tensor:
    """(I - Bᵀ(B Bᵀ)⁺B) c, taken twice since once leaves some rounding behind; with a ridge (I + BᵀB/μ)⁻¹ c."""
    A = B @ B.mT
    every = torch.ones(A.shape[-1:], dtype=torch.bool, device=A.device)
    if ridge:
        diagonal = A.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.sum(-1) / (diagonal > 0).sum(-1).clamp(min=1)
        A = A + torch.diag_embed((ridge * mean)[..., None] * (diagonal > 0))
        # Woodbury: (I + BᵀB/μ)⁻¹ = I - Bᵀ(B Bᵀ + μ)⁻¹B
        return c - times(B.mT, solve(A, times(B, c), every, RIDGED)[0])
    for _twice in range(2):
        c = c - times(B.mT, solve(A, times(B, c), every, tol)[0])
    return c


def _squeezed(found: Interference) -> Tensor:
    """The blocks whose subspace has no room beside the constraints."""
    return (found.dimension <= found.rank) & (found.dimension > 0) & ~found.share.isnan()


def _warn_if_nothing_is_left(found: Interference) -> None:
    """Name K, rank(B) and what is left of g_f where the subspace has no room beside the constraints."""
    squeezed = _squeezed(found)
    if not bool(squeezed.any()):
        return
    K, rank, share = (t[squeezed][0].item() for t in (found.dimension, found.rank, found.share))
    blocks = (
        f" in {int(squeezed.sum())} of {squeezed.numel()} blocks" if squeezed.numel() > 1 else ""
    )
    warnings.warn(
        f"InterferenceAware: the subspace has K = {K} dimensions and the retain rows have rank {rank} in it{blocks}, "
        f"so ‖d‖/‖g_f‖ = {share:.2g}: little or nothing is unlearned. Ways out: keep more rows, mtu.Subspace(size=K) "
        f"with K at least {2 * rank}; fewer retain samples per step; retain='target' (the other tasks are then "
        "unprotected); or ridge=0.1 (retain rows are then only nearly protected).",
        stacklevel=5,
    )
