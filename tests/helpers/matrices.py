"""Row sets [R, P] of controlled condition, rank and scale, float64, drawn from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast.methods.base import FORGET, RETAIN, Roles


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, width: int, seed: int) -> Tensor:
    """Orthonormal rows [rows, width], rows ≤ width."""
    return torch.linalg.qr(_normal(seed, width, rows)).Q.t()


def conditioned(R: int, P: int, cond: float, seed: int = 0) -> Tensor:
    """[R, P] with singular values spaced evenly in their logarithm from 1 down to 1 / cond."""
    k = min(R, P)
    values = torch.logspace(0, -torch.log10(torch.tensor(cond)).item(), k, dtype=torch.float64)
    return orthonormal(R, R, seed)[:, :k] * values @ orthonormal(k, P, seed + 1)


def low_rank(R: int, P: int, rank: int, seed: int = 0) -> Tensor:
    """[R, P] of exactly this rank (up to rounding), no row zero."""
    return _normal(seed, R, rank) @ _normal(seed + 1, rank, P)


def scaled(J: Tensor, decades: float, seed: int = 0) -> Tensor:
    """Rows multiplied by lengths spread over so many decades, in random order."""
    order = torch.randperm(len(J), generator=torch.Generator().manual_seed(seed))
    return J * torch.logspace(0, -decades, len(J), dtype=J.dtype)[order, None]


def with_duplicates(J: Tensor, times: int = 2) -> Tensor:
    """Every row `times` times, copies apart from one another, the last copies scaled by -3."""
    return torch.cat([J] * (times - 1) + [-3.0 * J])


def with_zero_row(J: Tensor, at: int = 0) -> Tensor:
    """J with row `at` zero."""
    J = J.clone()
    J[at] = 0.0
    return J


def random_vector(P: int, seed: int = 0) -> Tensor:
    """A random g [P]."""
    return _normal(seed, P)


def balanced_vector(J: Tensor, seed: int = 0) -> Tensor:
    """g [P] with equal weight on every right singular direction of J, and one unit outside their span."""
    V = torch.linalg.svd(J.double(), full_matrices=False).Vh
    outside = _normal(seed, J.shape[1])
    outside = outside - V.t() @ (V @ outside)
    outside = outside - V.t() @ (V @ outside)
    return V.sum(0) + outside / outside.norm()


def roles(
    kind: list[int], task: list[int] | None = None, dtype: torch.dtype = torch.float64
) -> Roles:
    """Roles for rows of these kinds and tasks (one task by default), losses zero."""
    of = torch.tensor(task if task is not None else [0] * len(kind), dtype=torch.int64)
    names = tuple("abcdefgh"[: int(of.max()) + 1 if len(kind) else 1])
    loss = torch.zeros(len(kind), dtype=torch.float64)
    return Roles(
        of, torch.arange(len(kind)), torch.tensor(kind, dtype=torch.int64), loss, names, dtype
    )


def roles_of(retain: int, forget: int, dtype: torch.dtype = torch.float64) -> Roles:
    """Roles of so many retain rows, then so many forget rows, of one task."""
    return roles([RETAIN] * retain + [FORGET] * forget, dtype=dtype)


def pulled_apart(R: int, P: int, share: float = 0.9, seed: int = 0) -> Tensor:
    """Random rows [R, P] less this share of their mean: at 0 pairs agree as often as not, near 1 most conflict."""
    J = _normal(seed, R, P)
    return J - share * J.mean(0)
