"""Forget rows enter gradient surgery negated, so that every row is one to descend on; and rows of unit length."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast.methods.base import FORGET, SUBSPACE, Roles, check_gram


def signs(roles: Roles) -> Tensor:
    """1 on retain rows, -1 on forget rows, 0 on subspace rows: `[R]` float64."""
    return 1.0 - 2.0 * (roles.kind == FORGET).double() - (roles.kind == SUBSPACE).double()


def signed_gram(method: str, G: Tensor, roles: Roles) -> tuple[Tensor, Tensor]:
    """The Gram matrix of the signed rows, and their signs; subspace rows are zero rows of it.

    Args:
        method: its name, for errors.
        G: `[..., R, R]`.
        roles: what the rows are.

    Returns:
        G `[..., R, R]` float64 and signs `[R]`. A `G` that does not fit is refused as by
        `check_gram`.
    """
    G, sign = check_gram(method, G, roles), signs(roles)
    return G * sign * sign[:, None], sign


def equilibrated(G: Tensor) -> tuple[Tensor, Tensor]:
    """C = D G D with unit diagonal, and D = 1 / length of each row; a zero row has D = 0 and is alone in C.

    Args:
        G: `[..., R, R]` float64.

    Returns:
        C `[..., R, R]` and D `[..., R]`.
    """
    square = G.diagonal(dim1=-2, dim2=-1)
    D = torch.where(square > 0, square.rsqrt(), torch.zeros_like(square))
    return G * D[..., None] * D[..., None, :] + torch.diag_embed((square <= 0).to(G)), D


def pair_gram(G: Tensor, r: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """<J^T r, J^T r>, <J^T r, J^T f>, <J^T f, J^T f>: `[...]` each, of two combinations `[R]` of the rows."""
    rows = torch.stack([r, f])  # [2, R]
    small = rows @ G @ rows.t()
    return small[..., 0, 0], small[..., 0, 1], small[..., 1, 1]
