"""Aligned-MTL on explicit gradient vectors, by the singular value decomposition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Rows, Sides, reference


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
    p = (
        torch.full_like(gradients[:, 0], 1 / max(len(gradients), 1))
        if preference is None
        else preference
    )
    A, sigma, Bt = torch.linalg.svd(gradients, full_matrices=False)
    rank = int((sigma > tol * sigma[:1]).sum())
    if rank == 0:
        return gradients.new_zeros(gradients.shape[1])
    return sigma[rank - 1] * Bt[:rank].t() @ (A[:, :rank].t() @ p)


def _share(sides: Sides, task: str, preference: Rows | None, **_: Any) -> Pair:
    """p of the task."""
    if preference is not None:
        return preference[task], preference[task]
    count = sum(len(rows) > 0 for side in (sides.retain, sides.forget) for rows in side.values())
    return 1 / max(count, 1), 1 / max(count, 1)


@reference("alignedmtl", outside=_share)
def direction(sides: Sides, preference: Rows | None = None, tol: float = 1e-7) -> Tensor:
    """`alignedmtl` of the signed mean rows; `preference` by task."""
    rows = sides.signed_matrix()
    p = (
        None
        if preference is None
        else rows.new_tensor([float(preference[task]) for _, task in sides.signed_means()])
    )
    return alignedmtl(rows, p, tol)
