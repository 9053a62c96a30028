"""Gram matrices of signed rows, of unit rows, and of two combinations of rows.

Forget rows enter surgery negated, so that every row is one to descend on. Rows of unit length make
the scale of a loss irrelevant to a solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtu_fast.methods._arguments import check_gram
from mtu_fast.methods.roles import Roles, signs


def signed_gram(method: str, G: Tensor, roles: Roles) -> tuple[Tensor, Tensor]:
    """The Gram matrix of the signed rows, and their signs; subspace rows are zero rows of it.

    Args:
        method: its name, for errors.
        G: [..., R, R]; one that does not fit raises what `check_gram` does.
        roles: what the rows are.

    Returns:
        G [..., R, R] float64 and signs [R].
    """
    G = check_gram(method, G, roles)
    sign = signs(roles)
    return G * sign * sign[:, None], sign


@dataclass(frozen=True)
class UnitRows:
    """The rows that take part, negated where they are to be forgotten, and divided by their lengths.

    Attributes:
        E: [..., R, R] their cosines; the identity where a row is not live.
        length: [..., R] lengths; 1 where a row is not live.
        live: [..., R] bool, rows that take part and are not zero.
        zero: [..., R] bool, rows that take part and are zero.
    """

    E: Tensor
    length: Tensor
    live: Tensor
    zero: Tensor


def unit_rows(G: Tensor, sign: Tensor) -> UnitRows:
    """Unit rows from their Gram matrix [..., R, R] and signs [R].

    The diagonal of E is 1 as rounded as the rest: rows that are equal or opposite are so in E, too.
    """
    squares = G.diagonal(dim1=-2, dim2=-1)
    taking = sign != 0
    live = taking & (squares > 0)
    length = torch.where(live, squares, 1.0).sqrt()
    unit = torch.where(live, sign / length, 0.0)
    # cosines, with the signs of the rows; G may be unsymmetric by rounding: one half is both
    lower = (G * unit[..., None] * unit[..., None, :]).tril()
    E = lower + lower.tril(-1).mT + torch.diag_embed((~live).to(G))
    return UnitRows(E, length, live, taking & ~live)


def pair_gram(G: Tensor, r: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """<J^T r, J^T r>, <J^T r, J^T f>, <J^T f, J^T f>: [...] each, of two combinations [R] of the rows."""
    rows = torch.stack([r, f])  # [2, R]
    # ⟨Jᵀr, Jᵀf⟩ = rᵀG f
    small = rows @ G @ rows.t()
    return small[..., 0, 0], small[..., 0, 1], small[..., 1, 1]


def times(M: Tensor, x: Tensor) -> Tensor:
    """M x [..., R] for every matrix and vector of a batch."""
    return (M @ x[..., None])[..., 0]


def norm(E: Tensor, x: Tensor) -> Tensor:
    """√(xᵀE x) [..., 1]."""
    return (x * times(E, x)).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
