"""IMTL-G on explicit gradient vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.reference.base import Reference, Sides


def imtlg(gradients: Tensor, tol: float = 1e-7) -> Tensor:
    """The d in the affine hull of the rows that has the same projection on every row's direction: [R, P] -> [P].

    With unit rows U, d is a multiple of U⁺ 1, since U U⁺ 1 = 1; its coefficients on the rows
    themselves sum to one. Zero rows are left out. No such d (coefficients that sum to zero) gives
    zero.

    Source: Liu et al., ICLR 2021, "Towards Impartial Multi-task Learning".
    """
    rows = gradients[gradients.norm(dim=1) > 0]
    nothing, length = gradients.new_zeros(gradients.shape[1]), rows.norm(dim=1)
    if not len(rows):
        return nothing
    inverse = torch.linalg.pinv(rows / length[:, None], rtol=tol)  # [P, R]
    # U⁺ 1
    d = inverse.sum(1)
    coefficients = (inverse.t() @ d) / length  # d = rows^T coefficients
    total = coefficients.sum()
    if total.abs() <= tol * max(coefficients.abs().sum(), (1 / length).max()):
        return nothing
    return d / total


@dataclass(frozen=True)
class IMTLG(Reference, called="imtlg"):
    """`imtlg` of the signed mean rows."""

    tol: float = 1e-7

    def direction(self, sides: Sides) -> Tensor:
        return imtlg(sides.signed_matrix(), self.tol)
