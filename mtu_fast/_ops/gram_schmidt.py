"""Gram-Schmidt: `G_aa x_a = rhs_a` on the span of the active rows and its rank, or an orthonormal basis of tall rows.

A pivoted Cholesky factorisation of `G = J Jᵀ` is Gram-Schmidt on the rows of J, longest remaining
row first, without touching J: the remaining diagonal holds the squared norms of what is left of the
rows. Rows are scaled to length one first, so that "what is left" is relative to the row, and a row
with less than `tol` left depends on its predecessors.

`solve` stays with G. `orthonormalize` goes back to the rows, twice: Gram, factor, rows times the
inverse factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from mtu_fast._ops._arguments import check_dense, check_devices, check_numbers, check_size
from mtu_fast._ops._blocks import WIDE
from mtu_fast._ops._library import Op, define
from mtu_fast._ops._tiles import TILE
from mtu_fast._ops.row_gram import row_gram

# that the CUDA kernels are asked to serve; their shared memory holds some vectors of them
MOST_ROWS = 2048
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


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
    _check_types(G, rhs, active)
    _check_shapes(G, rhs, active)
    _check_tolerance("solve", tol)
    x, rank = _serving(gram_schmidt, G)(G.detach(), rhs.detach(), active, float(tol))
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
    T, kept = _serving(basis, G)(G, float(tol))
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
    _check_tolerance("whiten", tol)
    first, kept = _serving(basis, G)(G, float(tol))
    second, _ = _serving(basis, G)(first @ G @ first.mT, float(tol))
    return second @ first, kept


@overload
def orthonormalize(rows: Tensor, tol: float | None = None) -> tuple[Tensor, Tensor]: ...


@overload
def orthonormalize(
    rows: Sequence[Tensor], tol: float | None = None
) -> tuple[list[Tensor], Tensor]: ...


def orthonormalize(
    rows: Tensor | Sequence[Tensor], tol: float | None = None
) -> tuple[Tensor | list[Tensor], Tensor]:
    """`Q` with `Q Qᵀ = diag(kept)` and the span of the rows: Gram-Schmidt on tall rows, longest remaining row first.

    Dependent, zero and duplicated rows become rows of zeros. Row i of Q is row i orthonormalised
    against the rows pivoted before it. NaN or infinity in a row gives NaN, not fewer rows. The
    result carries no gradient.

    Args:
        rows: `[K, P]`, a batch `[B, K, P]`, or one `[K, *shape]` for each of a list of parameters,
            of one dtype, whose rows lie across the whole list and are orthonormalised as such. Any
            float dtype.
        tol: Length, of a row scaled to length one, below which what is left of it counts as
            nothing; by default what `TOLERANCE` holds for the dtype.

    Returns:
        Q in the form and dtype of `rows`, and kept `[K]` or `[B, K]` bool.

    Raises:
        TypeError: `rows` are not floating point, or not of one dtype.
        ValueError: The shapes or devices do not fit together, or `tol` is not between 0 and 1.

    Source:
        Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, Roundoff error analysis of the CholeskyQR2
        algorithm, 2015.
    """
    listed = [rows] if isinstance(rows, Tensor) else list(rows)
    _check_rows(listed, batch=isinstance(rows, Tensor))
    if not listed:
        return [], torch.zeros(0, dtype=torch.bool)
    tol = TOLERANCE[listed[0].dtype] if tol is None else tol
    _check_tolerance("orthonormalize", tol)
    flat = (
        [rows.detach()]
        if isinstance(rows, Tensor)
        else [t.detach()[..., None].flatten(1) for t in listed]
    )
    G = _gram(flat)
    T, kept = _serving(basis, G)(G, float(tol))
    flat = transform(flat, T)
    # One round is orthonormal to eps / tol²; the next starts from nearly orthonormal rows and ends
    # at rounding.
    if torch.finfo(WIDE).eps > tol * tol * torch.finfo(flat[0].dtype).eps:
        G = _gram(flat)
        flat = transform(flat, _serving(basis, G)(G, float(tol))[0])
    if isinstance(rows, Tensor):
        return flat[0], kept
    return [q.view(t.shape) for q, t in zip(flat, listed, strict=True)], kept


def _serving(op: Op[..., Any], G: Tensor) -> Callable[..., Any]:
    """The op, or its reference where the CUDA kernels do not reach: more rows, or devices before sm_80."""
    if not G.is_cuda or (
        G.shape[-1] <= MOST_ROWS and torch.cuda.get_device_capability(G.device) >= (8, 0)
    ):
        return op
    return op.reference


def _gram(rows: Sequence[Tensor]) -> Tensor:
    """`Σ_l J_l J_lᵀ` float64: each `[K, P_l]`, or one batch `[B, K, P]`."""
    if rows[0].dim() == 2:
        return torch.stack([row_gram([t]) for t in rows]).sum(0)
    batch, (k, p) = rows[0], rows[0].shape[1:]
    if len(batch) == 0 or k * p <= TILE:
        wide = batch.to(WIDE)
        return wide @ wide.mT
    return torch.stack([row_gram([t]) for t in batch])


def _check_rows(rows: Sequence[Tensor], batch: bool) -> None:
    for i, t in enumerate(rows):
        name = "rows" if batch else f"rows[{i}]"
        if not isinstance(t, Tensor):
            raise TypeError(f"orthonormalize: {name} is {type(t).__name__}, expected a tensor.")
        if t.dtype not in TOLERANCE:
            raise TypeError(
                f"orthonormalize: {name} is {t.dtype}, expected one of {', '.join(map(str, TOLERANCE))}."
            )
        if batch and t.dim() not in (2, 3):
            raise ValueError(
                f"orthonormalize: rows has shape {list(t.shape)}, expected [K, P] or [B, K, P]. For K rows of one "
                f"parameter of another shape pass a list, [rows]."
            )
        if t.dim() == 0:
            raise ValueError(
                f"orthonormalize: {name} is a scalar, expected [K, *shape of the parameter]."
            )
        if t.dtype != rows[0].dtype:
            raise TypeError(
                f"orthonormalize: {name} is {t.dtype}, but rows[0] {rows[0].dtype}; use one dtype."
            )
        if not batch and len(t) != len(rows[0]):
            raise ValueError(
                f"orthonormalize: {name} has shape {list(t.shape)}, expected [{len(rows[0])}, ...] as rows[0] "
                f"{list(rows[0].shape)}: the same K rows for every parameter."
            )
        if t.device != rows[0].device:
            raise ValueError(
                f"orthonormalize: {name} is on {t.device}, rows[0] on {rows[0].device}; use one device."
            )


def _check_tolerance(name: str, tol: float) -> None:
    if not 0 < tol < 1:
        raise ValueError(
            f"{name}: tol is {tol}, expected a length between 0 and 1, such as 1e-6 for float32 rows."
        )


def _check_types(G: Tensor, rhs: Tensor, active: Tensor) -> None:
    for name, tensor in (("G", G), ("rhs", rhs)):
        check_dense(f"solve: {name}", tensor)
        check_size(f"solve: {name}", tensor)
        if tensor.dtype != torch.float64:
            raise TypeError(
                f"solve: {name} is {tensor.dtype}, expected torch.float64. A Gram matrix squares the condition of its "
                f"rows, so accumulate it in float64 (rows.gram() does) instead of converting a rounded one."
            )
    if active.dtype != torch.bool:
        raise TypeError(
            f"solve: active is {active.dtype}, expected torch.bool, such as `roles.kind == RETAIN`."
        )


def _check_shapes(G: Tensor, rhs: Tensor, active: Tensor) -> None:
    if G.dim() < 2 or G.shape[-1] != G.shape[-2]:
        raise ValueError(
            f"solve: G has shape {list(G.shape)}, expected [..., R, R] (the Gram matrix of R rows)."
        )
    if rhs.shape != G.shape[:-1]:
        raise ValueError(
            f"solve: rhs has shape {list(rhs.shape)}, expected {list(G.shape[:-1])} to go with G {list(G.shape)}: "
            f"one value per row. Expand it over the leading dimensions, or solve for one right-hand side at a time."
        )
    if active.shape != G.shape[-1:]:
        raise ValueError(
            f"solve: active has shape {list(active.shape)}, expected [{G.shape[-1]}]: one flag a row."
        )
    if not G.device == rhs.device == active.device:
        raise ValueError(
            f"solve: G is on {G.device}, rhs on {rhs.device}, active on {active.device}; move them to one device."
        )


def _check_solve(G: Tensor, rhs: Tensor, active: Tensor, tol: float) -> None:
    _check_types(G, rhs, active)
    _check_shapes(G, rhs, active)
    _check_tolerance("solve", tol)


def _check_basis(G: Tensor, tol: float) -> None:
    check_dense("G", G)
    check_size("G", G)
    if G.dtype != WIDE:
        raise TypeError(f"G is {G.dtype}, expected float64, as rows.gram() gives it.")
    if G.dim() < 2 or G.shape[-1] != G.shape[-2]:
        raise ValueError(f"G has shape {list(G.shape)}, expected [..., K, K].")
    _check_tolerance("basis", tol)


def _check_transform(rows: Sequence[Tensor], T: Tensor) -> None:
    check_dense("T", T)
    check_size("T", T)
    if T.dtype != WIDE:
        raise TypeError(f"T is {T.dtype}, expected float64.")
    if T.dim() not in (2, 3) or T.shape[-1] != T.shape[-2]:
        raise ValueError(f"T has shape {list(T.shape)}, expected [K, K] or [B, K, K].")
    check_devices(T=[T], rows=rows)
    for i, t in enumerate(rows):
        check_numbers(f"rows[{i}]", t)
        check_size(f"rows[{i}]", t)
        if t.shape[:-1] != T.shape[:-1]:
            raise ValueError(
                f"rows[{i}] has shape {list(t.shape)}, expected [K, P_l] to go with T [K, K], or [B, K, P_l] with "
                f"[B, K, K]; T has {list(T.shape)}."
            )


@define(
    "gram_schmidt(Tensor G, Tensor rhs, Tensor active, float tol) -> (Tensor x, Tensor rank)",
    check=_check_solve,
)
def gram_schmidt(G: Tensor, rhs: Tensor, active: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """The op behind `solve`, in plain torch: R steps, vectorised over the leading dimensions, no host round trip."""
    A, scale, spans = _equilibrate(G, active)
    steps = _factor(A, torch.where(spans, rhs * scale, 0.0)[..., None], spans, tol)
    rank = sum(
        (step.alive for step in steps),
        start=torch.zeros_like(rhs[..., :0].sum(-1), dtype=torch.int64),
    )
    return _back_substitute(steps, torch.zeros_like(rhs)) * scale, rank


@gram_schmidt.fake
def _(G: Tensor, rhs: Tensor, active: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    return rhs.new_empty(rhs.shape), rhs.new_empty(rhs.shape[:-1], dtype=torch.int64)


@define("basis(Tensor G, float tol) -> (Tensor T, Tensor kept)", check=_check_basis)
def basis(G: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """`T G Tᵀ = diag(kept)`: T such that T J is orthonormal, from `G = J Jᵀ` `[..., K, K]` float64.

    Row i of T is what orthonormalises row i of J against the rows pivoted before it, longest
    remaining first; it is zero where that leaves less than `tol` of the row. NaN or infinity in G
    gives NaN in T, not fewer rows.

    Returns:
        T `[..., K, K]` float64, lower triangular in the order of the pivots, and kept `[..., K]`
        bool.
    """
    A, scale, spans = _equilibrate(
        G, torch.ones_like(G.diagonal(dim1=-2, dim2=-1), dtype=torch.bool)
    )
    steps = _factor(A, torch.diag_embed(scale), spans, tol)
    T, kept = torch.zeros_like(G, memory_format=torch.contiguous_format), torch.zeros_like(spans)
    for step in reversed(steps):  # those after the last pivot name rows anew, to be overwritten
        T = T.scatter(
            -2, step.pivot[..., None].expand(*G.shape[:-2], 1, G.shape[-1]), step.z[..., None, :]
        )
        kept = kept.scatter(-1, step.pivot, step.alive[..., None])
    return T, kept


@basis.fake
def _(G: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    return G.new_empty(G.shape), G.new_empty(G.shape[:-1], dtype=torch.bool)


@define("transform(Tensor[] rows, Tensor T) -> Tensor[]", check=_check_transform)
def transform(rows: Sequence[Tensor], T: Tensor) -> list[Tensor]:
    """`T J_l` with float64 sums, in the dtype of J_l: `[K, P_l]` with T `[K, K]`, or `[B, K, P_l]` with `[B, K, K]`."""
    step = max(1, TILE // max(T.shape[-1], 1))
    out = [t.new_empty(t.shape) for t in rows]
    for t, result in zip(rows, out, strict=True):
        for start in range(0, t.shape[-1], step):
            result[..., start : start + step] = T @ t[..., start : start + step].to(WIDE)
    return out


@transform.fake
def _(rows: Sequence[Tensor], T: Tensor) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in rows]


transform.triton("gram_schmidt")


@dataclass(frozen=True)
class _Step:
    """One pivot of the factorisation A = L Lᵀ and of the forward substitution L z = rhs."""

    pivot: Tensor  # [..., 1] the row that spans a new direction
    alive: Tensor  # [...] whether there was one left; once false it stays so
    column: Tensor  # [..., R] column of L; 0 on the rows of earlier steps
    root: Tensor  # [..., 1] its entry at the pivot
    z: Tensor  # [..., C]


def _equilibrate(G: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Gram of the rows scaled to length 1, their scales, and which of them may span; zeros elsewhere."""
    length = G.diagonal(dim1=-2, dim2=-1)
    spans = active & ~(length <= 0)  # a NaN stays in, to be seen in the result
    scale = torch.where(spans, length.rsqrt(), 0.0)
    pairs = spans[..., :, None] & spans[..., None, :]
    return torch.where(pairs, G * scale[..., :, None] * scale[..., None, :], 0.0), scale, spans


def _factor(A: Tensor, rhs: Tensor, candidate: Tensor, tol: float) -> list[_Step]:
    """Pivoted Cholesky of A `[..., R, R]`, largest remaining diagonal first, L z = rhs `[..., R, C]`; overwrites A."""
    steps = []
    left = A.diagonal(dim1=-2, dim2=-1)  # [..., R], a view
    for _ in range(A.shape[-1]):
        # infinity of either sign becomes NaN
        height = torch.where(candidate, left + (left - left), -1.0)
        height, pivot = height.max(-1, keepdim=True)  # NaN is the largest of all
        alive = ~(height < tol * tol)
        root = torch.where(alive, height, 1.0).sqrt()
        column = torch.where(alive & candidate, _row(A, pivot) / root, 0.0)
        z = torch.where(alive, _row(rhs, pivot) / root, 0.0)
        steps.append(_Step(pivot, alive.squeeze(-1), column, root, z))
        A.addcmul_(column[..., :, None], column[..., None, :], value=-1.0)
        rhs = rhs - column[..., :, None] * z[..., None, :]
        candidate = candidate.scatter(-1, pivot, False)
    return steps


def _row(A: Tensor, index: Tensor) -> Tensor:
    """Row `index` `[..., 1]` of A `[..., R, C]`, each matrix its own: `[..., C]`."""
    return A.gather(-2, index[..., None].expand(*A.shape[:-2], 1, A.shape[-1])).squeeze(-2)


def _back_substitute(steps: list[_Step], x: Tensor) -> Tensor:
    """Solve Lᵀ x = z from the last pivot to the first, starting from zeros x `[..., R]`; 0 on rows without a pivot."""
    for step in reversed(steps):
        value = (step.z - (step.column * x).sum(-1, keepdim=True)) / step.root
        x = x.scatter(-1, step.pivot, value)
    return x
