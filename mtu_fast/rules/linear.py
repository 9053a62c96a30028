"""Matrix products: rows are outer products of the two sides, `Σ_s a[s] ⊗ b[s]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtu_fast.ops._blocks import working_dtype
from mtu_fast.rowmap import RowMap
from mtu_fast.rules.base import rule, scaled, summed
from mtu_fast.uses import Dense, Outer, Use


@rule("AddmmBackward0")
def addmm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """`out = beta·bias + alpha·mat1 @ mat2`, b `[M, O]`."""
    if slot == 0:
        return summed(scaled(b, node._saved_beta), rows, shape)
    b = scaled(b, node._saved_alpha)
    return _product(node, slot - 1, shape, b, rows, ("_saved_mat1", "_saved_mat2"))


@rule("MmBackward0")
def mm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """`out = self @ mat2`, b `[M, O]`."""
    return _product(node, slot, shape, b, rows, ("_saved_self", "_saved_mat2"))


@rule("BmmBackward0")
def bmm(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """`out[e] = self[e] @ mat2[e]`, b `[E, M, O]`, rows along M (or O): one outer product per batch entry."""
    contracted = 1 if slot == 1 else 2
    if rows.dim != contracted:
        return None
    other = (node._saved_self if slot == 1 else node._saved_mat2).detach()
    b_rows = rows.split(b, contracted)  # [N, S, E, O] or [N, S, E, M]
    a_rows = rows.split(other, contracted)  # [N, S, E, I]
    left, right = (a_rows, b_rows) if slot == 1 else (b_rows, a_rows)
    if shape[0] == 1:
        return Outer(shape, left[:, :, 0], right[:, :, 0])
    dtype = working_dtype(b)
    return Dense(shape, torch.einsum("rsea,rseb->reab", left.to(dtype), right.to(dtype)))


def _product(
    node: Any, side: int, shape: tuple[int, ...], b: Tensor, rows: RowMap, saved: tuple[str, str]
) -> Outer | None:
    """The parameter is mat1 (side 0: rows along the columns of b) or mat2 (side 1: rows along its rows)."""
    contracted = 1 - side
    if rows.dim != contracted:
        return None
    other = getattr(node, saved[contracted]).detach()
    # mat1ᵀ b sums over M, b mat2ᵀ over O: in both the contracted dimension of `other` is where b has its rows.
    parts = [rows.split(other, contracted), rows.split(b, contracted)]
    left, right = parts if side == 1 else reversed(parts)
    return Outer(shape, left, right)
