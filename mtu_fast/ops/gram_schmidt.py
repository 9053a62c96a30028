"""`G_aa x_a = rhs_a` on the span of the active rows, and its rank: Gram-Schmidt carried out on the Gram matrix.

A pivoted Cholesky factorisation of `G = J Jᵀ` is Gram-Schmidt on the rows of J, longest remaining row first, without
touching J: the remaining diagonal holds the squared norms of what is left of the rows. Rows are scaled to length one
first, so that "what is left" is relative to the row, and a row with less than `tol` left depends on its predecessors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.ops._library import define

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def solve(G: Tensor, rhs: Tensor, active: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """`x_a = G_aa⁺ rhs_a` on a maximal independent subset of the active rows, 0 elsewhere, and the size of that subset.

    For `rhs = J g` the combination `Jᵀ x` is the orthogonal projection of g on the span of the active rows. Dependent,
    zero and duplicated rows are ordinary input: they get weight 0 and do not count. NaN or infinity in the active part
    gives NaN, not a smaller rank. The result carries no gradient.

    Args:
        G: Gram matrices, `[..., R, R]` float64, symmetric; the part above or below the diagonal may be read.
        rhs: Inner products with the vectors to be projected, `[..., R]` float64.
        active: The rows that span, `[R]` bool, the same for all leading dimensions.
        tol: Length, of a row scaled to length one, below which what is left of it counts as nothing. Rows computed in
            float32 carry 1e-6, in float64 1e-7, in bfloat16 1e-2 (`TOLERANCE`).

    Returns:
        Weights `x` `[..., R]` float64, and the rank `[...]` int64.

    Raises:
        TypeError: `G` or `rhs` is not float64, or `active` is not bool.
        ValueError: The shapes or devices do not fit together, or `tol` is not positive.

    Source:
        Higham, Accuracy and Stability of Numerical Algorithms, section 10.3 (complete pivoting); Demmel, Applied
        Numerical Linear Algebra, section 2.5.2 (equilibration).
    """
    _check_types(G, rhs, active)
    _check_shapes(G, rhs, active)
    if not 0 < tol < 1:
        raise ValueError(f"solve: tol is {tol}, expected a length between 0 and 1, such as 1e-6 for float32 rows.")
    x, rank = gram_schmidt(G.detach(), rhs.detach(), active, float(tol))
    return x, rank


def effective_rank(G: Tensor, tol: float) -> Tensor:
    """The number of rows of J that are independent to `tol`, from `G = J Jᵀ`.

    Args:
        G: Gram matrices, `[..., R, R]` float64.
        tol: As in `solve`.

    Returns:
        The rank, `[...]` int64.

    Raises:
        TypeError: `G` is not float64.
        ValueError: `G` is not square, or `tol` is not between 0 and 1.
    """
    active = torch.ones(G.shape[-1:], dtype=torch.bool, device=G.device)
    return solve(G, G.new_zeros(G.shape[:-1]), active, tol)[1]


def _check_types(G: Tensor, rhs: Tensor, active: Tensor) -> None:
    for name, tensor in (("G", G), ("rhs", rhs)):
        if tensor.dtype != torch.float64:
            raise TypeError(
                f"solve: {name} is {tensor.dtype}, expected torch.float64. A Gram matrix squares the condition of its "
                f"rows, so accumulate it in float64 (rows.gram() does) instead of converting a rounded one."
            )
    if active.dtype != torch.bool:
        raise TypeError(f"solve: active is {active.dtype}, expected torch.bool, such as `roles.kind == RETAIN`.")


def _check_shapes(G: Tensor, rhs: Tensor, active: Tensor) -> None:
    if G.dim() < 2 or G.shape[-1] != G.shape[-2]:
        raise ValueError(f"solve: G has shape {list(G.shape)}, expected [..., R, R] (the Gram matrix of R rows).")
    if rhs.shape != G.shape[:-1]:
        raise ValueError(
            f"solve: rhs has shape {list(rhs.shape)}, expected {list(G.shape[:-1])} to go with G {list(G.shape)}: "
            f"one value a row. Expand it over the leading dimensions, or solve for one right-hand side at a time."
        )
    if active.shape != G.shape[-1:]:
        raise ValueError(f"solve: active has shape {list(active.shape)}, expected [{G.shape[-1]}]: one flag a row.")
    if not G.device == rhs.device == active.device:
        raise ValueError(
            f"solve: G is on {G.device}, rhs on {rhs.device}, active on {active.device}; move them to one device."
        )


@define("gram_schmidt(Tensor G, Tensor rhs, Tensor active, float tol) -> (Tensor x, Tensor rank)")
def gram_schmidt(G: Tensor, rhs: Tensor, active: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """The op behind `solve`, in plain torch: R steps, vectorised over the leading dimensions, no host round trip."""
    length = G.diagonal(dim1=-2, dim2=-1)
    spans = active & ~(length <= 0)  # a NaN stays in, to be seen in the result
    scale = torch.where(spans, length.rsqrt(), 0.0)
    A = torch.where(spans[..., :, None] & spans[..., None, :], G * scale[..., :, None] * scale[..., None, :], 0.0)
    steps = _factor(A, torch.where(spans, rhs * scale, 0.0), spans, tol)
    rank = sum((step.alive for step in steps), start=torch.zeros_like(rhs[..., :0].sum(-1), dtype=torch.int64))
    return _back_substitute(steps, torch.zeros_like(rhs)) * scale, rank


@gram_schmidt.fake
def _fake(G: Tensor, rhs: Tensor, active: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    return rhs.new_empty(rhs.shape), rhs.new_empty(rhs.shape[:-1], dtype=torch.int64)


@dataclass(frozen=True)
class _Step:
    """One pivot of the factorisation A = L Lᵀ and of the forward substitution L z = rhs."""

    pivot: Tensor  # [..., 1] the row that spans a new direction
    alive: Tensor  # [...] whether there was one left; once false it stays so
    column: Tensor  # [..., R] column of L; 0 on the rows of earlier steps
    root: Tensor  # [..., 1] its entry at the pivot
    z: Tensor  # [..., 1]


def _factor(A: Tensor, rhs: Tensor, candidate: Tensor, tol: float) -> list[_Step]:
    """Pivoted Cholesky of A `[..., R, R]`, largest remaining diagonal first; overwrites A with what is left of it."""
    steps = []
    left = A.diagonal(dim1=-2, dim2=-1)  # [..., R], a view
    for _ in range(A.shape[-1]):
        height, pivot = torch.where(candidate, left, -1.0).max(-1, keepdim=True)  # NaN is the largest of all
        alive = ~(height < tol * tol)
        root = torch.where(alive, height, 1.0).sqrt()
        column = A.gather(-1, pivot[..., None, :].expand(*A.shape[:-1], 1)).squeeze(-1) / root
        column = torch.where(alive & candidate, column, 0.0)
        z = torch.where(alive, rhs.gather(-1, pivot) / root, 0.0)
        steps.append(_Step(pivot, alive.squeeze(-1), column, root, z))
        A.addcmul_(column[..., :, None], column[..., None, :], value=-1.0)
        rhs = rhs - column * z
        candidate = candidate.scatter(-1, pivot, False)
    return steps


def _back_substitute(steps: list[_Step], x: Tensor) -> Tensor:
    """Solve Lᵀ x = z from the last pivot to the first, starting from zeros x `[..., R]`; 0 on rows without a pivot."""
    for step in reversed(steps):
        value = (step.z - (step.column * x).sum(-1, keepdim=True)) / step.root
        x = x.scatter(-1, step.pivot, value)
    return x
