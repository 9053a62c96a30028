"""The ops: solve, basis and product with its factor, each in plain torch; kernels attach themselves to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtu_fast._ops._blocks import WIDE
from mtu_fast._ops._library import define
from mtu_fast._ops._tiles import TILE
from mtu_fast._ops.gram_schmidt._checks import check_basis, check_solve, check_transform
from mtu_fast._ops.gram_schmidt._pivoted import back_substitute, equilibrate, factor


@define(
    "gram_schmidt(Tensor G, Tensor rhs, Tensor active, float tol) -> (Tensor x, Tensor rank)",
    check=check_solve,
)
def gram_schmidt(G: Tensor, rhs: Tensor, active: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """The op behind `solve`, in plain torch: R steps, vectorised over the leading dimensions, no host round trip."""
    A, scale, spans = equilibrate(G, active)
    steps = factor(A, torch.where(spans, rhs * scale, 0.0)[..., None], spans, tol)
    rank = rhs.new_zeros(rhs.shape[:-1], dtype=torch.int64)
    for step in steps:
        rank = rank + step.alive
    # x of the scaled rows: G_aa x = rhs is A (x / scale) = scale · rhs
    return back_substitute(steps, torch.zeros_like(rhs)) * scale, rank


@gram_schmidt.fake
def _(G: Tensor, rhs: Tensor, active: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    return rhs.new_empty(rhs.shape), rhs.new_empty(rhs.shape[:-1], dtype=torch.int64)


@define("basis(Tensor G, float tol) -> (Tensor T, Tensor kept)", check=check_basis)
def basis(G: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """`T G Tᵀ = diag(kept)`: T such that T J is orthonormal, from `G = J Jᵀ` `[..., K, K]` float64.

    Row i of T is what orthonormalises row i of J against the rows pivoted before it, longest
    remaining first; it is zero where that leaves less than `tol` of the row. NaN or infinity in G
    gives NaN in T, not fewer rows.

    Returns:
        T `[..., K, K]` float64, lower triangular in the order of the pivots, and kept `[..., K]`
        bool.
    """
    every = torch.ones_like(G.diagonal(dim1=-2, dim2=-1), dtype=torch.bool)
    A, scale, spans = equilibrate(G, every)
    steps = factor(A, torch.diag_embed(scale), spans, tol)  # L Z = D⁻¹: row i of T is row i of Z
    T, kept = torch.zeros_like(G, memory_format=torch.contiguous_format), torch.zeros_like(spans)
    for step in reversed(steps):  # those after the last pivot name rows anew, to be overwritten
        row = step.pivot[..., None].expand(*G.shape[:-2], 1, G.shape[-1])
        T = T.scatter(-2, row, step.z[..., None, :])
        kept = kept.scatter(-1, step.pivot, step.alive[..., None])
    return T, kept


@basis.fake
def _(G: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    return G.new_empty(G.shape), G.new_empty(G.shape[:-1], dtype=torch.bool)


@define("transform(Tensor[] rows, Tensor T) -> Tensor[]", check=check_transform)
def transform(rows: Sequence[Tensor], T: Tensor) -> list[Tensor]:
    """`T J_l` with float64 sums, in the dtype of J_l: `[K, P_l]` with T `[K, K]`, or `[B, K, P_l]` with `[B, K, K]`."""
    step = max(1, TILE // max(T.shape[-1], 1))
    out = [t.new_empty(t.shape) for t in rows]
    for t, result in zip(rows, out, strict=True):
        for start in range(0, t.shape[-1], step):
            columns = slice(start, start + step)
            result[..., columns] = T @ t[..., columns].to(WIDE)
    return out


@transform.fake
def _(rows: Sequence[Tensor], T: Tensor) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in rows]


transform.triton("gram_schmidt")
