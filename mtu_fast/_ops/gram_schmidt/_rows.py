"""Gram-Schmidt on tall rows: their Gram, its factor, and the rows times the inverse factor, twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from mtu_fast._ops._blocks import WIDE
from mtu_fast._ops._tiles import TILE
from mtu_fast._ops.gram_schmidt._ops import basis, transform
from mtu_fast._ops.gram_schmidt._solve import serving
from mtu_fast._ops.gram_schmidt._tolerance import TOLERANCE, check_tolerance
from mtu_fast._ops.row_gram import row_gram


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
    check_tolerance("orthonormalize", tol)
    if isinstance(rows, Tensor):
        (q,), kept = _orthonormal([rows.detach()], float(tol))
        return q, kept
    # a parameter of no dimensions has rows [K, 1]
    flat, kept = _orthonormal([t.detach()[..., None].flatten(1) for t in listed], float(tol))
    return [q.view(t.shape) for q, t in zip(flat, listed, strict=True)], kept


def _orthonormal(flat: list[Tensor], tol: float) -> tuple[list[Tensor], Tensor]:
    """The same for rows `[K, P_l]`, or one batch `[B, K, P]`."""
    flat, kept = _round(flat, tol)
    # One round is orthonormal to eps / tol²; the next starts from nearly orthonormal rows and ends
    # at rounding.
    if torch.finfo(WIDE).eps > tol * tol * torch.finfo(flat[0].dtype).eps:
        flat, _ = _round(flat, tol)
    return flat, kept


def _round(flat: list[Tensor], tol: float) -> tuple[list[Tensor], Tensor]:
    """`T J` with `T G Tᵀ = diag(kept)` for `G = J Jᵀ` as it is computed."""
    G = _gram(flat)
    T, kept = serving(basis, G)(G, tol)
    return transform(flat, T), kept


def _gram(rows: Sequence[Tensor]) -> Tensor:
    """`Σ_l J_l J_lᵀ` float64: each `[K, P_l]`, or one batch `[B, K, P]`."""
    if rows[0].dim() == 2:
        return torch.stack([row_gram([t]) for t in rows]).sum(0)
    batch, (k, p) = rows[0], rows[0].shape[1:]
    # rows that fit into cache are widened at once, longer ones tile by tile
    if len(batch) == 0 or k * p <= TILE:
        wide = batch.to(WIDE)
        return wide @ wide.mT
    return torch.stack([row_gram([t]) for t in batch])


def _check_rows(rows: Sequence[Tensor], batch: bool) -> None:
    for i, t in enumerate(rows):
        name = "rows" if batch else f"rows[{i}]"
        _check_one(name, t, batch)
        _check_beside(name, t, rows[0])
        if not batch and len(t) != len(rows[0]):
            raise ValueError(
                f"orthonormalize: {name} has shape {list(t.shape)}, expected [{len(rows[0])}, ...] as rows[0] "
                f"{list(rows[0].shape)}: the same K rows for every parameter."
            )


def _check_one(name: str, t: Tensor, batch: bool) -> None:
    """Rows by themselves."""
    if not isinstance(t, Tensor):
        raise TypeError(f"orthonormalize: {name} is {type(t).__name__}, expected a tensor.")
    if t.dtype not in TOLERANCE:
        known = ", ".join(map(str, TOLERANCE))
        raise TypeError(f"orthonormalize: {name} is {t.dtype}, expected one of {known}.")
    if batch and t.dim() not in (2, 3):
        raise ValueError(
            f"orthonormalize: rows has shape {list(t.shape)}, expected [K, P] or [B, K, P]. For K rows of one "
            f"parameter of another shape pass a list, [rows]."
        )
    if t.dim() == 0:
        raise ValueError(
            f"orthonormalize: {name} is a scalar, expected [K, *shape of the parameter]."
        )


def _check_beside(name: str, t: Tensor, first: Tensor) -> None:
    """Rows beside those of the first parameter."""
    if t.dtype != first.dtype:
        raise TypeError(
            f"orthonormalize: {name} is {t.dtype}, but rows[0] {first.dtype}; use one dtype."
        )
    if t.device != first.device:
        raise ValueError(
            f"orthonormalize: {name} is on {t.device}, rows[0] on {first.device}; use one device."
        )
