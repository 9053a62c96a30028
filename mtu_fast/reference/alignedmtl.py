"""Aligned-MTL on explicit gradient vectors, by the singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Rows, Sides, even


def alignedmtl(gradients: Tensor, preference: Tensor | None = None, tol: float = 1e-7) -> Tensor:
    """σ_min (A Bᵀ)ᵀ p for gradients = A Σ Bᵀ, over the singular values above tol · σ_max: [R, P] -> [P].

    Args:
        gradients: [R, P], one gradient per task; a gradient to be ascended is negated by the
            caller.
        preference: p [R]; 1/R by default.
        tol: relative size below which a singular value counts as zero.

    Returns:
        The update direction [P].

    Source: Senushkin et al., CVPR 2023, algorithm 1.
    """
    p = preference
    if p is None:
        p = torch.full_like(gradients[:, 0], 1 / max(len(gradients), 1))
    # A [R, k], Σ [k], Bᵀ [k, P]
    A, sigma, Bt = torch.linalg.svd(gradients, full_matrices=False)
    rank = int((sigma > tol * sigma[:1]).sum())
    if rank == 0:
        return gradients.new_zeros(gradients.shape[1])
    # all singular values become the smallest: σ_min B Aᵀ p
    return sigma[rank - 1] * Bt[:rank].t() @ (A[:, :rank].t() @ p)


@dataclass(frozen=True)
class AlignedMTL(Reference, called="alignedmtl"):
    """`alignedmtl` of the signed mean rows; `preference` by task."""

    preference: Rows | None = None
    tol: float = 1e-7

    def direction(self, sides: Sides) -> Tensor:
        rows = sides.signed_matrix()
        if self.preference is None:
            return alignedmtl(rows, None, self.tol)
        wanted = [float(self.preference[task]) for _, task in sides.signed_means()]
        return alignedmtl(rows, rows.new_tensor(wanted), self.tol)

    def outside(self, sides: Sides, task: str) -> Pair:
        if self.preference is not None:
            return self.preference[task], self.preference[task]
        return even(sides)
