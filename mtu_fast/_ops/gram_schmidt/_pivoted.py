"""Pivoted Cholesky of scaled Gram matrices in plain torch: R steps, vectorised over the leading dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One pivot of the factorisation A = L Lᵀ and of the forward substitution L z = rhs."""

    pivot: Tensor  # [..., 1] the row that spans a new direction
    alive: Tensor  # [...] whether there was one left; once false it stays so
    column: Tensor  # [..., R] column of L; 0 on the rows of earlier steps
    root: Tensor  # [..., 1] its entry at the pivot
    z: Tensor  # [..., C]


def equilibrate(G: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Gram of the rows scaled to length 1, their scales, and which of them may span; zeros elsewhere."""
    length = G.diagonal(dim1=-2, dim2=-1)
    spans = active & ~(length <= 0)  # a NaN stays in, to be seen in the result
    scale = torch.where(spans, length.rsqrt(), 0.0)
    pairs = spans[..., :, None] & spans[..., None, :]
    # where, since 0 · NaN of a row that stays out would be NaN
    A = torch.where(pairs, G * scale[..., :, None] * scale[..., None, :], 0.0)
    return A, scale, spans


def factor(A: Tensor, rhs: Tensor, candidate: Tensor, tol: float) -> list[Step]:
    """Pivoted Cholesky of A `[..., R, R]`, largest remaining diagonal first, L z = rhs `[..., R, C]`; overwrites A."""
    steps = []
    left = A.diagonal(dim1=-2, dim2=-1)  # [..., R], a view
    for k in range(A.shape[-1]):
        not_finite_is_nan = left + (left - left)
        height = torch.where(candidate, not_finite_is_nan, -1.0)
        # at first all are of length 1 but for rounding, which is not to choose; NaN is the largest
        compared = torch.where(height > 0.0, 1.0, height) if k == 0 else height
        pivot = compared.argmax(-1, keepdim=True)
        height = height.gather(-1, pivot)
        alive = ~(height < tol * tol)
        root = torch.where(alive, height, 1.0).sqrt()
        column = torch.where(alive & candidate, _row(A, pivot) / root, 0.0)
        z = torch.where(alive, _row(rhs, pivot) / root, 0.0)
        steps.append(Step(pivot, alive.squeeze(-1), column, root, z))
        # What is left of the rows once the new direction is taken out: A - l lᵀ, in place, so that
        # `left` sees it.
        A.addcmul_(column[..., :, None], column[..., None, :], value=-1.0)
        rhs = rhs - column[..., :, None] * z[..., None, :]
        candidate = candidate.scatter(-1, pivot, False)
    return steps


def _row(A: Tensor, index: Tensor) -> Tensor:
    """Row `index` `[..., 1]` of A `[..., R, C]`, each matrix its own: `[..., C]`."""
    return A.gather(-2, index[..., None].expand(*A.shape[:-2], 1, A.shape[-1])).squeeze(-2)


def back_substitute(steps: list[Step], x: Tensor) -> Tensor:
    """Solve Lᵀ x = z from the last pivot to the first, starting from zeros x `[..., R]`; 0 on rows without a pivot."""
    for step in reversed(steps):
        value = (step.z - (step.column * x).sum(-1, keepdim=True)) / step.root
        x = x.scatter(-1, step.pivot, value)
    return x
