"""Gram-Schmidt: `G_aa x_a = rhs_a` on the span of the active rows and its rank, or an orthonormal basis of tall rows.

A pivoted Cholesky factorisation of `G = J Jᵀ` is Gram-Schmidt on the rows of J, longest remaining
row first, without touching J: the remaining diagonal holds the squared norms of what is left of the
rows. Rows are scaled to length one first, so that "what is left" is relative to the row, and a row
with less than `tol` left depends on its predecessors.

`solve` stays with G. `orthonormalize` goes back to the rows, twice: Gram, factor, rows times the
inverse factor. `_pivoted` is the algorithm, `_ops` makes ops of it, and `_checks` looks at what they
are given.
"""

from mtu_fast._ops.gram_schmidt._ops import basis, gram_schmidt, transform
from mtu_fast._ops.gram_schmidt._rows import orthonormalize
from mtu_fast._ops.gram_schmidt._solve import condition, effective_rank, serving, solve, whiten
from mtu_fast._ops.gram_schmidt._tolerance import TOLERANCE

__all__ = [
    "TOLERANCE",
    "basis",
    "condition",
    "effective_rank",
    "gram_schmidt",
    "orthonormalize",
    "serving",
    "solve",
    "transform",
    "whiten",
]
