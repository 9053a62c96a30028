"""What a Gram matrix alone says: solutions on the span, rank, condition, and rows made orthonormal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtu_fast._ops._blocks import WIDE
from mtu_fast._ops._library import Op
from mtu_fast._ops.gram_schmidt._checks import check_solve
from mtu_fast._ops.gram_schmidt._ops import basis, gram_schmidt
from mtu_fast._ops.gram_schmidt._tolerance import check_tolerance

# that the CUDA kernels are asked to serve; their shared memory holds some vectors of them
MOST_ROWS = 2048


def solve(G: Tensor, rhs: Tensor, active: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """`x_a = G_aa⁺ rhs_a` on a maximal independent subset of the active rows, 0 elsewhere, and the size of that subset.

    For `rhs = J g` the combination `Jᵀ x` is the orthogonal projection of g on the span of the
    active rows. Dependent, zero and duplicated rows are ordinary input: they get weight 0 and do
    not count. NaN or infinity in the active part gives NaN, not a smaller rank. The result carries
    no gradient.

    Args:
        G: Gram matrices, `[..., R, R]` float64, symmetric; the part above or below the diagonal may
            be read.
        rhs: Inner products with the vectors to be projected, `[..., R]` float64.
        active: The rows that span, `[R]` bool, the same for all leading dimensions.
        tol: Length, of a row scaled to length one, below which what is left of it counts as
            nothing. Rows computed in float32 carry 1e-6, in float64 1e-7, in bfloat16 1e-2
            (`TOLERANCE`).

    Returns:
        Weights `x` `[..., R]` float64, and the rank `[...]` int64.

    Raises:
        TypeError: `G` or `rhs` is not float64, or `active` is not bool.
        ValueError: The shapes or devices do not fit together, or `tol` is not positive.

    Source:
        Higham, Accuracy and Stability of Numerical Algorithms, section 10.3 (complete pivoting);
        Demmel, Applied Numerical Linear Algebra, section 2.5.2 (equilibration).
    """
    check_solve(G, rhs, active, tol)
    x, rank = serving(gram_schmidt, G)(G.detach(), rhs.detach(), active, float(tol))
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


def condition(G: Tensor, length: Tensor, tol: float, dependent: float = torch.inf) -> Tensor:
    """`‖D⁻¹ G D⁻¹‖_F^½ · max_i ‖(T D)_i‖` with `T G Tᵀ = 1`: σ_max / σ_min of the rows scaled by D⁻¹, estimated.

    The first factor is at least σ_max, the second at most 1 / σ_min and close to it, since pivots
    come longest first.

    Args:
        G: Gram matrices, `[..., R, R]` float64. Rows of zeros stay out.
        length: the diagonal of D, by which the rows are scaled, `[..., R]`; their own lengths, as a
            rule.
        tol: As in `solve`.
        dependent: What a row counts for that depends on the others.

    Returns:
        `[...]` float64; at least `dependent` where a row depends on the others, 0 where there are
        none.
    """
    T, kept = serving(basis, G)(G, float(tol))
    inverse = torch.where(length > 0, length.reciprocal(), 0.0)
    largest = torch.linalg.matrix_norm(G * inverse[..., None] * inverse[..., None, :]).sqrt()
    grown = torch.linalg.vector_norm(T * length[..., None, :], dim=-1)  # [..., R]
    grown = torch.where(kept | (G.diagonal(dim1=-2, dim2=-1) <= 0), grown, dependent)
    return largest * torch.nn.functional.pad(grown, (0, 1)).amax(-1)


def whiten(G: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """T with `T G Tᵀ = diag(kept)`: rows of T J are orthonormal or zero, from `G = J Jᵀ`; longest remaining row first.

    Two rounds: the first is orthonormal to eps / tol², the second to rounding.

    Args:
        G: Gram matrices, `[..., R, R]` float64. Rows of zeros stay out.
        tol: Length, of a row scaled to length one, below which what is left of it counts as
            nothing.

    Returns:
        T `[..., R, R]` float64, and kept `[..., R]` bool.

    Raises:
        TypeError: `G` is not float64.
        ValueError: `G` is not square, or `tol` is not between 0 and 1.
    """
    if G.dtype != WIDE or G.dim() < 2 or G.shape[-1] != G.shape[-2]:
        error = TypeError if G.dtype != WIDE else ValueError
        raise error(
            f"whiten: G is {G.dtype} {list(G.shape)}, expected float64 [..., R, R], as rows.gram() gives it."
        )
    check_tolerance("whiten", tol)
    first, kept = serving(basis, G)(G, float(tol))
    second, _ = serving(basis, G)(first @ G @ first.mT, float(tol))
    return second @ first, kept


def serving(op: Op[..., Any], G: Tensor) -> Callable[..., Any]:
    """The op, or its reference where the CUDA kernels do not reach: more rows, or devices before sm_80.

    Whatever serves looks at its arguments itself.
    """
    if not G.is_cuda:
        return op.unchecked
    new_enough = torch.cuda.get_device_capability(G.device) >= (8, 0)
    return op.unchecked if new_enough and G.shape[-1] <= MOST_ROWS else op.reference
