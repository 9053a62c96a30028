"""`Σ_r w_r row_r` over several uses of one parameter: one weight gradient for all that share an activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from mtu_fast._ops._blocks import same
from mtu_fast._rows.merge import parts_of
from mtu_fast._rows.uses import Chain, Conv, Gather, Outer, Several, Use, weigh

# A use with its weights; None where they are in the use already.
Weighted = tuple[Use, Tensor | None]


def vjp(uses: Sequence[Use], weights: Sequence[Tensor]) -> Tensor:
    """`Σ_i Σ_r w_i[r] row_i[r]`, in the parameter's shape.

    Uses that share an activation (one forward under several tasks) add up their weighted output
    gradients first.
    """
    # nothing that could share an activation
    if len(uses) == 1 and not isinstance(uses[0], Several):
        return uses[0].vjp(weights[0])
    parts: list[Weighted] = []
    for use, w in zip(uses, weights, strict=True):
        for each in parts_of(use):
            _put(parts, each, w)
    found: dict[tuple[Chain, tuple[int, ...]], Tensor] = {}
    for use, left in _end_to_end(parts):
        space, part = (use.chain, use.shape), use.weighted(left)
        if space not in found:
            found[space] = part
        elif found[space].dtype == part.dtype:
            found[space] += part  # in place: a table may be most of the memory
        else:
            found[space] = found[space] + part
    # A (x + y) = A x + A y: each chain is walked once
    return reduce(torch.add, (chain.apply(part) for (chain, _), part in found.items()))


def _end_to_end(parts: Sequence[Weighted]) -> list[Weighted]:
    """The same with outer products of few positions as one: one sum, where several would be as large as the weight."""
    found: list[Weighted] = []
    few: dict[tuple[Chain, tuple[int, ...]], list[tuple[Outer, Tensor | None]]] = {}
    for use, w in parts:
        if isinstance(use, Outer) and use.left.numel() + use.right.numel() <= prod(use.shape):
            few.setdefault((use.chain, use.shape), []).append((use, w))
        else:
            found.append((use, w))
    return found + [_one_outer(some) if len(some) > 1 else some[0] for some in few.values()]


def _one_outer(parts: Sequence[tuple[Outer, Tensor | None]]) -> Weighted:
    """Rows and positions of all are positions of one row, whose weights are in it."""
    lefts, rights = zip(*(use.weighted_sides(w) for use, w in parts), strict=True)
    # [1, Σ R·S, A] and [1, Σ R·S, B]
    return replace(parts[0][0], left=torch.cat(lefts)[None], right=torch.cat(rights)[None]), None


def _put(parts: list[Weighted], use: Use, w: Tensor) -> None:
    """Add a use to those that share an activation with it, or as one of its own."""
    for i, (other, of_other) in enumerate(parts):
        joined = _joined(use, w, other, of_other)
        if joined is not None:
            parts[i] = (joined, None)
            return
    parts.append((use, w))


def _joined(u: Use, w: Tensor, v: Use, of_v: Tensor | None) -> Use | None:
    """One use whose unweighted sum is that of two weighted ones with the same activation; None if they have not."""
    if type(u) is not type(v) or u.chain != v.chain or u.shape != v.shape:
        return None
    join = _JOINS.get(type(u))
    return None if join is None else join(u, w, v, of_v)


def _join_outer(u: Outer, w: Tensor, v: Outer, of_v: Tensor | None) -> Outer | None:
    # Σ w (a ⊗ b) + Σ v (a ⊗ c) = Σ a ⊗ (w b + v c)
    if same(u.left, v.left):
        return Outer(u.shape, u.left, weigh(u.right, w, weigh(v.right, of_v)), chain=u.chain)
    if same(u.right, v.right):
        return Outer(u.shape, weigh(u.left, w, weigh(v.left, of_v)), u.right, chain=u.chain)
    return None


def _join_conv(u: Conv, w: Tensor, v: Conv, of_v: Tensor | None) -> Conv | None:
    if u.geometry != v.geometry or not same(u.x, v.x):
        return None
    return replace(u, b=weigh(u.b, w, weigh(v.b, of_v)))


def _join_gather(u: Gather, w: Tensor, v: Gather, of_v: Tensor | None) -> Gather | None:
    if not same(u.index, v.index):
        return None
    return replace(u, values=weigh(u.values, w, weigh(v.values, of_v)))


_JOINS: dict[type[Use], Callable[[Any, Tensor, Any, Tensor | None], Use | None]] = {
    Outer: _join_outer,
    Conv: _join_conv,
    Gather: _join_gather,
}
