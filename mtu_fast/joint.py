"""What several uses make together: one use, one Gram, one combination, of one parameter or of many.

Uses of one kind, shape and chain meet on this side of it; others in the space of the parameter itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from math import lcm, prod
from typing import TypeVar

import torch
from torch import Tensor

from mtu_fast.ops import gram as op
from mtu_fast.ops._blocks import WIDE, memory, same
from mtu_fast.uses import Conv, Dense, Gather, Outer, Use, weigh

SMALL = 1 << 14  # numbers of a row: below, calls cost more than the work, and parameters are taken together
U = TypeVar("U", bound=Use)

# ---- one parameter --------------------------------------------------------------------------------------------------


def merge(uses: Sequence[Use]) -> Use:
    """One use for the sum of several uses of one parameter by the same rows."""
    first = uses[0]
    if len(uses) == 1:
        return first
    if aligned(uses):
        if outers := _only(Outer, uses):
            left, right = ([getattr(u, side) for u in outers] for side in ("left", "right"))
            return Outer(first.shape, torch.cat(left, 1), torch.cat(right, 1), chain=first.chain)
        if gathers := _only(Gather, uses):
            index, values = (torch.cat([getattr(u, side) for u in gathers], 1) for side in ("index", "values"))
            return Gather(first.shape, index, values, chain=first.chain)
        rows = torch.stack([u.matrix() for u in uses]).sum(0)
        return Dense(first.shape, rows.view(first.count, *first.shape), chain=first.chain)
    rows = torch.stack([u.grounded().rows for u in uses]).sum(0)
    return Dense(tuple(rows.shape[1:]), rows)


def aligned(uses: Sequence[Use]) -> bool:
    """Whether the uses share one chain and shape, so that they meet on this side of it."""
    return all(u.chain == uses[0].chain and u.shape == uses[0].shape for u in uses)


def combine(uses: Sequence[Use], weights: Sequence[Tensor]) -> Tensor:
    """`Σ_i Σ_r w_i[r] row_i[r]` over several uses of one parameter, in the parameter's shape.

    Uses that share an activation (one forward under several tasks) add up their weighted output gradients first: one
    weight gradient for all of them.
    """
    parts: list[tuple[Use, Tensor | None]] = []  # without weights where they are in the use already
    for use, w in zip(uses, weights, strict=True):
        for i, (other, of_other) in enumerate(parts):
            if (joined := _joined(use, w, other, of_other)) is not None:
                parts[i] = (joined, None)
                break
        else:
            parts.append((use, w))
    found = [use.combine(w) for use, w in parts]
    return sum(found[1:], found[0])


def _joined(u: Use, w: Tensor, v: Use, of_v: Tensor | None) -> Use | None:
    """One use whose unweighted sum is that of two weighted ones with the same activation; None if they have not."""
    if u.chain != v.chain or u.shape != v.shape:
        return None
    if isinstance(u, Outer) and isinstance(v, Outer):
        if same(u.left, v.left):
            return replace(u, right=weigh(u.right, w, weigh(v.right, of_v)))
        if same(u.right, v.right):
            return replace(u, left=weigh(u.left, w, weigh(v.left, of_v)))
    if isinstance(u, Conv) and isinstance(v, Conv) and u.geometry == v.geometry and same(u.x, v.x):
        return replace(u, b=weigh(u.b, w, weigh(v.b, of_v)))
    return None


def gram(uses: Sequence[Use], precision: str = "highest") -> Tensor:
    """`G = J Jᵀ` of one parameter over the rows of several uses, float64 `[ΣR, ΣR]`; `precision` as in `ops.gram`.

    Uses of one kind, shape and chain go to their op together; unequal ones meet as explicit rows.
    """
    if not aligned(uses):
        return op.row_gram([u.grounded().matrix() for u in uses])
    if outers := _only(Outer, uses):
        return op.outer_gram([u.left for u in outers], [u.right for u in outers], precision)
    if convs := _only(Conv, uses):
        return op.conv_gram([u.x for u in convs], [u.b for u in convs], convs[0].geometry, precision)
    if gathers := _only(Gather, uses):
        return op.gather_gram([u.index for u in gathers], [u.values for u in gathers], precision)
    return _mixed_gram(uses)


def _mixed_gram(uses: Sequence[Use]) -> Tensor:
    """`gram` of aligned uses of several kinds, a tile of explicit rows at a time."""
    R, width, unit = sum(u.count for u in uses), prod(uses[0].shape), lcm(*(u.unit for u in uses))
    step = max(op.BUFFER // max(R * unit, 1), 1) * unit
    found = uses[0].tensors[-1].new_zeros(R, R, dtype=WIDE)
    for start in range(0, width, max(step, 1)):
        found += op.row_gram([u.columns(start, min(start + step, width)) for u in uses])
    return found


def route(uses: Sequence[Use]) -> str:
    """The route that `gram` takes for these uses, in words."""
    if aligned(uses):
        if outers := _only(Outer, uses):
            return "outer, " + op.outer_route([u.left for u in outers], [u.right for u in outers])
        if convs := _only(Conv, uses):
            return "conv, " + op.conv_route([u.x for u in convs], [u.b for u in convs], convs[0].geometry)
        if _only(Gather, uses):
            return "entries that occur"
    return "explicit rows"


# ---- many parameters ------------------------------------------------------------------------------------------------


def rank_one(uses: Sequence[Use]) -> list[Outer]:
    """The uses if their rows are outer products of one position in one space, else nothing."""
    outers = _only(Outer, uses) if aligned(uses) else []
    return outers if all(u.left.shape[1] == 1 for u in outers) else []


def rank_one_gram(
    parameters: Sequence[Sequence[Outer]], beside: Sequence[list[Use]]
) -> tuple[Tensor, list[list[Use]]]:
    """The sum of `gram` over parameters with uses of rank one by the same rows: one call for all of them.

    Parameters of explicit rows `beside` them that are a side of the outer products (a bias) join as products with 1,
    the products of that side being known; the others are handed back.
    """
    pairs = [([u.left[:, 0] for u in uses], [u.right[:, 0] for u in uses]) for uses in parameters]
    one = pairs[0][0][0].new_ones(())
    of_side = {tuple(map(memory, side)): at for at, pair in enumerate(pairs) for side in pair}
    biases: dict[int, list[tuple[list[Tensor], list[Tensor]]]] = {}
    others = []
    for uses in beside:
        rows = [use.matrix() for use in uses]
        at = of_side.get(tuple(map(memory, rows)))
        if at is None:
            others.append(uses)
        else:
            biases.setdefault(at, []).append((rows, [one.expand(len(t), 1) for t in rows]))
    # A bias right behind its weight: the products of their side need not be held for long.
    order = [each for at, pair in enumerate(pairs) for each in (pair, *biases.get(at, ()))]
    left, right = (list(chain.from_iterable(sides)) for sides in zip(*order, strict=True))
    return op.rank_one_gram(left, right, len(order)), others


def small(uses: Sequence[Use]) -> bool:
    """Whether the uses are few explicit numbers a row in one space: taken together with others (`side_by_side`)."""
    return bool(_only(Dense, uses)) and prod(uses[0].shape) <= SMALL and aligned(uses)


def side_by_side(parameters: Sequence[Sequence[Use]]) -> Iterator[list[Tensor]]:
    """The rows of small uses of parameters by the same rows, joined to `[R_i, ΣP]` per block, some at a time."""
    some: list[list[Tensor]] = []
    taken = 0
    for uses in parameters:
        rows = [use.matrix() for use in uses]
        taken += sum(t.numel() for t in rows)
        if some and taken > op.BUFFER:
            yield [torch.cat(block, 1) for block in zip(*some, strict=True)]
            some, taken = [], sum(t.numel() for t in rows)
        some.append(rows)
    if some:
        yield [torch.cat(block, 1) for block in zip(*some, strict=True)]


def _only(kind: type[U], uses: Sequence[Use]) -> list[U]:
    """The uses if all are of this kind (convolutions: of one geometry), else nothing."""
    found = [u for u in uses if isinstance(u, kind)]
    walks = {getattr(u, "geometry", None) for u in found}
    return found if len(found) == len(uses) and len(walks) == 1 else []
