"""What the ops refuse: types, shapes and devices of a Gram matrix and what goes with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtu_fast._ops._arguments import check_dense, check_devices, check_numbers, check_size
from mtu_fast._ops._blocks import WIDE
from mtu_fast._ops.gram_schmidt._tolerance import check_tolerance


def check_solve(G: Tensor, rhs: Tensor, active: Tensor, tol: float) -> None:
    _check_types(G, rhs, active)
    _check_shapes(G, rhs, active)
    check_tolerance("solve", tol)


def _check_types(G: Tensor, rhs: Tensor, active: Tensor) -> None:
    for name, tensor in (("G", G), ("rhs", rhs)):
        check_dense(f"solve: {name}", tensor)
        check_size(f"solve: {name}", tensor)
        if tensor.dtype != torch.float64:
            raise TypeError(
                f"solve: {name} is {tensor.dtype}, expected torch.float64. A Gram matrix squares the condition of its "
                f"rows, so accumulate it in float64 (rows.gram() does) instead of converting a rounded one."
            )
    if active.dtype != torch.bool:
        raise TypeError(
            f"solve: active is {active.dtype}, expected torch.bool, such as `roles.kind == RETAIN`."
        )


def _check_shapes(G: Tensor, rhs: Tensor, active: Tensor) -> None:
    if G.dim() < 2 or G.shape[-1] != G.shape[-2]:
        raise ValueError(
            f"solve: G has shape {list(G.shape)}, expected [..., R, R] (the Gram matrix of R rows)."
        )
    if rhs.shape != G.shape[:-1]:
        raise ValueError(
            f"solve: rhs has shape {list(rhs.shape)}, expected {list(G.shape[:-1])} to go with G {list(G.shape)}: "
            f"one value per row. Expand it over the leading dimensions, or solve for one right-hand side at a time."
        )
    if active.shape != G.shape[-1:]:
        raise ValueError(
            f"solve: active has shape {list(active.shape)}, expected [{G.shape[-1]}]: one flag a row."
        )
    if not G.device == rhs.device == active.device:
        raise ValueError(
            f"solve: G is on {G.device}, rhs on {rhs.device}, active on {active.device}; move them to one device."
        )


def check_basis(G: Tensor, tol: float) -> None:
    check_dense("G", G)
    check_size("G", G)
    if G.dtype != WIDE:
        raise TypeError(f"G is {G.dtype}, expected float64, as rows.gram() gives it.")
    if G.dim() < 2 or G.shape[-1] != G.shape[-2]:
        raise ValueError(f"G has shape {list(G.shape)}, expected [..., K, K].")
    check_tolerance("basis", tol)


def check_transform(rows: Sequence[Tensor], T: Tensor) -> None:
    check_dense("T", T)
    check_size("T", T)
    if T.dtype != WIDE:
        raise TypeError(f"T is {T.dtype}, expected float64.")
    if T.dim() not in (2, 3) or T.shape[-1] != T.shape[-2]:
        raise ValueError(f"T has shape {list(T.shape)}, expected [K, K] or [B, K, K].")
    check_devices(T=[T], rows=rows)
    for i, t in enumerate(rows):
        check_numbers(f"rows[{i}]", t)
        check_size(f"rows[{i}]", t)
        if t.shape[:-1] != T.shape[:-1]:
            raise ValueError(
                f"rows[{i}] has shape {list(t.shape)}, expected [K, P_l] to go with T [K, K], or [B, K, P_l] with "
                f"[B, K, K]; T has {list(T.shape)}."
            )
