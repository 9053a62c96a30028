"""`x ≥ 0, s = M x + q ≥ 0, x·s = 0`: the minimum of ½ xᵀM x + qᵀx over x ≥ 0, for many q and one small M."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtu_fast._ops._arguments import check_dense, check_size
from mtu_fast._ops._library import define
from mtu_fast._ops.complementary import _exchange


def _check(M: Tensor, q: Tensor, dependent: bool) -> None:
    for name, tensor in (("M", M), ("q", q)):
        check_dense(f"complementary: {name}", tensor)
        check_size(f"complementary: {name}", tensor)
        if tensor.dtype != torch.float64:
            raise TypeError(f"complementary: {name} is {tensor.dtype}, expected torch.float64.")
    if M.dim() != 2 or M.shape[0] != M.shape[1]:
        raise ValueError(f"complementary: M has shape {list(M.shape)}, expected [n, n].")
    if q.dim() != 2 or q.shape[1] != len(M):
        raise ValueError(
            f"complementary: q has shape {list(q.shape)}, expected [K, {len(M)}] to go with M {list(M.shape)}."
        )
    if M.device != q.device:
        raise ValueError(
            f"complementary: M is on {M.device}, q on {q.device}; move them to one device."
        )


@define(
    "complementary(Tensor M, Tensor q, bool dependent) -> (Tensor x, Tensor ended)", check=_check
)
def complementary(M: Tensor, q: Tensor, dependent: bool) -> tuple[Tensor, Tensor]:
    """x `[K, n]` of K problems by exchanging rows, in numpy on the CPU, and whether that ended for each, `[K]` bool.

    Args:
        M: `[n, n]` float64, positive semidefinite, diagonal near 1.
        q: `[K, n]` float64, of order 1.
        dependent: whether M is too near a singular one to do without a ridge, which is taken back.

    Returns:
        x, 0 where the exchanges do not end, and ended.
    """
    x, ended = torch.zeros_like(q), q.isfinite().all(1) & M.isfinite().all()
    if not M.numel() or not ended.any():
        return x, ended
    try:
        with np.errstate(all="ignore"):
            given = M.numpy(force=True), q[ended].numpy(force=True)
            solved, done = map(torch.from_numpy, _exchange.each(*given, dependent))
    except np.linalg.LinAlgError:
        return x, torch.zeros_like(ended)
    return x.masked_scatter(ended[:, None], solved.to(x)), ended.masked_scatter(
        ended, done.to(ended)
    )


@complementary.fake
def _(M: Tensor, q: Tensor, dependent: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:1], dtype=torch.bool)
