"""`g - Qᵀ(Q g)`, the part of g outside the span of orthonormal rows Q, or `Qᵀ(Q g)`, the part inside.

Both lie across a list of parameters. Two passes over Q, which is by far the largest: the
coefficients need all of it before the first element of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from mtu_fast._ops._arguments import check_devices, check_numbers, check_size
from mtu_fast._ops._blocks import WIDE
from mtu_fast._ops._library import define
from mtu_fast._ops._tiles import TILE

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@overload
def project(g: Tensor, Q: Tensor, into: bool = False) -> Tensor: ...


@overload
def project(g: Sequence[Tensor], Q: Sequence[Tensor], into: bool = False) -> list[Tensor]: ...


def project(
    g: Tensor | Sequence[Tensor], Q: Tensor | Sequence[Tensor], into: bool = False
) -> Tensor | list[Tensor]:
    """`g - Qᵀ(Q g)`, out of the span of the rows of Q, or `Qᵀ(Q g)`, into it.

    The inner products run over the whole list, in float64; the result is rounded once. Rows of
    zeros in Q, such as `orthonormalize` leaves for dependent rows, change nothing. The result
    carries no gradient.

    Args:
        g: One tensor a parameter, of its shape, or M vectors at once, `[M, *shape]` (they share
            each pass over Q). The shape of a parameter is that of Q without the first dimension.
            Dtypes may differ from Q's.
        Q: K rows, orthonormal over the whole list, `[K, *shape]` for each parameter.
        into: Project into the span instead of out of it.

    Returns:
        A tensor like each g, of its dtype; one tensor where g is one.

    Raises:
        TypeError: g and Q are not both tensors or both sequences, or not floating point.
        ValueError: The numbers of parameters, the shapes or the devices do not fit together.
    """
    if isinstance(g, Tensor) and isinstance(Q, Tensor):
        return project([g], [Q], into)[0]
    if isinstance(g, Tensor) or isinstance(Q, Tensor):
        raise TypeError(
            "project: one of g and Q is a tensor and the other a sequence; pass two tensors or two lists."
        )
    _check(g, Q)
    if not g:
        return []
    several = g[0].dim() == Q[0].dim()
    vectors = [
        t.detach()[..., None].flatten(1) if several else t.detach().reshape(1, -1) for t in g
    ]
    parts = project_op(vectors, [t.detach()[..., None].flatten(1) for t in Q], bool(into))
    return [part.view(t.shape) for part, t in zip(parts, g, strict=True)]


def _check(g: Sequence[Tensor], Q: Sequence[Tensor]) -> None:
    if len(g) != len(Q):
        raise ValueError(
            f"project: g has {len(g)} tensors, Q has {len(Q)}; expected one of each for every parameter."
        )
    for name, tensors in (("g", g), ("Q", Q)):
        for i, t in enumerate(tensors):
            _check_tensor(f"{name}[{i}]", t, Q)
    several = g[0].dim() == Q[0].dim() if g else False
    for i, (vector, rows) in enumerate(zip(g, Q, strict=True)):
        _check_rows(i, rows, Q)
        shape = list(rows.shape[1:])
        expected = [*g[0].shape[:1], *shape] if several else shape
        if list(vector.shape) != expected:
            raise ValueError(
                f"project: g[{i}] has shape {list(vector.shape)}, expected {expected} to go with Q[{i}] "
                f"{list(rows.shape)}, which is [K, *shape of the parameter]: g has that shape, or [M, *shape] for M "
                f"vectors, the same M for every parameter. Are g and Q exchanged?"
            )


def _check_tensor(name: str, t: Any, Q: Sequence[Tensor]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"project: {name} is {type(t).__name__}, expected a tensor.")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"project: {name} is {t.dtype}, expected one of {', '.join(map(str, FLOATS))}."
        )
    if isinstance(Q[0], Tensor) and t.device != Q[0].device:
        raise ValueError(
            f"project: {name} is on {t.device}, Q[0] on {Q[0].device}; use one device."
        )


def _check_rows(i: int, rows: Tensor, Q: Sequence[Tensor]) -> None:
    if rows.dim() == 0:
        raise ValueError(f"project: Q[{i}] is a scalar, expected [K, *shape of the parameter].")
    if len(rows) != len(Q[0]):
        raise ValueError(
            f"project: Q[{i}] has shape {list(rows.shape)}, expected [{len(Q[0])}, ...] as Q[0] "
            f"{list(Q[0].shape)}: the same K rows for every parameter."
        )


def _check_flat(g: Sequence[Tensor], Q: Sequence[Tensor], into: bool) -> None:
    if not g or len(g) != len(Q):
        raise ValueError(f"found {len(g)} g and {len(Q)} Q, expected as many, one at least.")
    check_devices(g=g, Q=Q)
    for i, (vectors, rows) in enumerate(zip(g, Q, strict=True)):
        for name, t in (("g", vectors), ("Q", rows)):
            check_numbers(f"{name}[{i}]", t)
            check_size(f"{name}[{i}]", t)
        if vectors.dim() != 2 or rows.dim() != 2 or vectors.shape[1] != rows.shape[1]:
            raise ValueError(
                f"g[{i}] has shape {list(vectors.shape)} and Q[{i}] {list(rows.shape)}, expected [M, P_l] and [K, P_l]."
            )
        if (len(vectors), len(rows)) != (len(g[0]), len(Q[0])):
            raise ValueError(
                f"g[{i}] and Q[{i}] have {len(vectors)} and {len(rows)} rows, expected {len(g[0])} and {len(Q[0])}: "
                "the same for every parameter."
            )


@define("project(Tensor[] g, Tensor[] Q, bool into) -> Tensor[]", check=_check_flat)
def project_op(g: Sequence[Tensor], Q: Sequence[Tensor], into: bool) -> list[Tensor]:
    """The op behind `project`, in plain torch: g_l `[M, P_l]` and Q_l `[K, P_l]`, a tile at a time -> like g_l."""
    m, k = g[0].shape[0], Q[0].shape[0]
    step = max(1, TILE // max(m + k, 1))
    # c = g Qᵀ must be whole, over all parameters, before anything is taken off
    c = g[0].new_zeros(m, k, dtype=WIDE)
    for vectors, rows in zip(g, Q, strict=True):
        for start in range(0, rows.shape[1], step):
            tile = slice(start, start + step)
            c.addmm_(vectors[:, tile].to(WIDE), rows[:, tile].to(WIDE).T)
    out = [t.new_empty(t.shape) for t in g]
    for vectors, rows, result in zip(g, Q, out, strict=True):
        for start in range(0, rows.shape[1], step):
            tile = slice(start, start + step)
            inside = c @ rows[:, tile].to(WIDE)
            result[:, tile] = inside if into else vectors[:, tile].to(WIDE) - inside
    return out


@project_op.fake
def _(g: Sequence[Tensor], Q: Sequence[Tensor], into: bool) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in g]


project_op.triton("project")
