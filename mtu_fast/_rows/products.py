"""What several uses make together: one use, one Gram, one combination, of one parameter or of many.

Uses of one shape and chain meet on this side of it, of whatever kinds; others in the space of the
parameter itself, as explicit rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain
from math import lcm, prod
from typing import TypeVar

import torch
from torch import Tensor

from mtu_fast._ops import gram as op
from mtu_fast._ops._blocks import WIDE, memory, same
from mtu_fast._rows.uses import (
    Chain,
    Common,
    Conv,
    Dense,
    Gather,
    Outer,
    Several,
    Stacked,
    Use,
    weigh,
)

# numbers of a row: below, calls cost more than the work, and parameters are taken together
SMALL = 1 << 14
U = TypeVar("U", bound=Use)

# ---- one parameter -------------------------------------------------------------------------------


def merge(uses: Sequence[Use]) -> Use:
    """One use for the sum of several uses of one parameter by the same rows.

    Kinds of factors stay beside one another, since their rows may be far larger: one row of a table
    is the table. Where some are rows already, all become rows: those take no more memory, and other
    kinds meet rows by forming their own.
    """
    first = uses[0]
    if len(uses) == 1:
        return first
    if not aligned(uses):
        rows = reduce(torch.add, (u.grounded().rows for u in uses))
        return Dense(tuple(rows.shape[1:]), rows)
    kinds: dict[type[Use], list[Use]] = {}
    for part in chain.from_iterable(map(_parts, uses)):
        kinds.setdefault(type(part), []).append(part)
    one = _sum([_alike(kind) for kind in kinds.values()])
    return one.dense() if any(isinstance(part, Dense) for part in _parts(one)) else one


def _parts(use: Use) -> tuple[Use, ...]:
    return use.parts if isinstance(use, Several) else (use,)


def _sum(parts: Sequence[Use]) -> Use:
    return (
        parts[0] if len(parts) == 1 else Several(parts[0].shape, tuple(parts), chain=parts[0].chain)
    )


def _alike(uses: Sequence[Use]) -> Use:
    """`merge` of uses of one kind in one space: where rows are sums over positions, of all positions together."""
    first = uses[0]
    if len(uses) == 1:
        return first
    if isinstance(first, Outer | Gather):
        found = first.with_tensors(
            *(torch.cat(side, 1) for side in zip(*(u.tensors for u in uses), strict=True))
        )
        if isinstance(found, Gather):
            return replace(found, sparse=all(u.sparse for u in _only(Gather, uses)))
        return found
    if commons := _only(Common, uses):
        scale, direction = (
            torch.cat([u.scale for u in commons], 1),
            torch.cat([u.direction for u in commons]),
        )
        return Common(first.shape, scale, direction, chain=first.chain)
    if stacks := _only(Stacked, uses):
        blocks = _by_block(stacks)
        parts = tuple(merge(of_block) for _, of_block in blocks.values())
        return Stacked(first.shape, parts, tuple(blocks), chain=first.chain)
    rows = reduce(torch.add, (u.matrix() for u in uses))
    return Dense(first.shape, rows.view(first.count, *first.shape), chain=first.chain)


def is_table(use: Use) -> bool:
    """Whether a row is a large table of which other uses than its look-ups are known."""
    return (
        prod(use.shape) > SMALL
        and isinstance(use, Several)
        and any(isinstance(part, Gather) for part in use.parts)
    )


def aligned(uses: Sequence[Use]) -> bool:
    """Whether the uses share one chain and shape, so that they meet on this side of it."""
    return all(u.chain == uses[0].chain and u.shape == uses[0].shape for u in uses)


def vjp(uses: Sequence[Use], weights: Sequence[Tensor]) -> Tensor:
    """`Σ_i Σ_r w_i[r] row_i[r]` over several uses of one parameter, in the parameter's shape.

    Uses that share an activation (one forward under several tasks) add up their weighted output
    gradients first: one weight gradient for all of them.
    """
    parts: list[tuple[Use, Tensor | None]] = []  # without weights where they are in the use already
    given = [(part, w) for use, w in zip(uses, weights, strict=True) for part in _parts(use)]
    for use, w in given:
        for i, (other, of_other) in enumerate(parts):
            if (joined := _joined(use, w, other, of_other)) is not None:
                parts[i] = (joined, None)
                break
        else:
            parts.append((use, w))
    found: dict[tuple[Chain, tuple[int, ...]], Tensor] = {}
    for use, left in parts:
        space, part = (use.chain, use.shape), use.weighted(left)
        if space in found and found[space].dtype == part.dtype:
            found[space] += part  # in place: a table may be most of the memory
        else:
            found[space] = found[space] + part if space in found else part
    return reduce(torch.add, (way.apply(part) for (way, _), part in found.items()))


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
    if isinstance(u, Gather) and isinstance(v, Gather) and same(u.index, v.index):
        return replace(u, values=weigh(u.values, w, weigh(v.values, of_v)))
    return None


def gram(uses: Sequence[Use], precision: str = "highest", known: int = 0) -> Tensor:
    """`G = J Jᵀ` of one parameter over the rows of several uses, float64 `[ΣR, ΣR]`; `precision` as in `ops.gram`.

    Kinds of factors go to their ops, kind by kind and pair by pair; what has no op meets as
    explicit rows, a tile of them at a time where uses share their space. Products of the last
    `known` rows with one another, which are explicit, are left out.
    """
    if not aligned(uses):
        return op.row_gram([u.grounded().matrix() for u in uses], known)
    if known:
        return _mixed_gram(uses, known)
    kinds = _apart(uses)
    if len(kinds) == 1:
        return _gram_alike(uses, precision)
    counts = [u.count for u in uses]
    found = uses[0].tensors[-1].new_zeros(sum(counts), sum(counts), dtype=WIDE)
    rows = torch.arange(len(found), device=found.device).split(counts)
    at = [torch.cat([rows[i] for i in blocks]) for blocks, _ in kinds]
    for k, (_, own) in enumerate(kinds):
        found[at[k][:, None], at[k]] += _gram_alike(own, precision)
        for j, (_, others) in enumerate(kinds[:k]):
            cross = _cross_gram(own, others, precision)
            found[at[k][:, None], at[j]] += cross
            found[at[j][:, None], at[k]] += cross.T
    return found


def _apart(uses: Sequence[Use]) -> list[tuple[list[int], list[Use]]]:
    """The parts of aligned uses, kind by kind: which of the uses have any, and those.

    Kinds are told apart where they have a product of their own. Others are one kind, that of
    explicit rows: whatever they meet, they are formed.
    """
    kinds = {_kind(part) for use in uses for part in _parts(use)} - {Common}
    formed = len(kinds) > 1 and not (kinds <= {Outer, Gather} and len(uses[0].shape) == 2)
    found: dict[object, dict[int, list[Use]]] = {}
    for i, use in enumerate(uses):
        for part in _parts(use):
            kind = Dense if formed and not isinstance(part, Common) else _kind(part)
            found.setdefault(kind, {}).setdefault(i, []).append(part)
    return [(list(blocks), [_sum(parts) for parts in blocks.values()]) for blocks in found.values()]


def _kind(use: Use) -> object:
    return getattr(use, "geometry", type(use))


def _gram_alike(uses: Sequence[Use], precision: str) -> Tensor:
    """`gram` of aligned uses of one kind."""
    if outers := _only(Outer, uses):
        return op.outer_gram([u.left for u in outers], [u.right for u in outers], precision)
    if convs := _only(Conv, uses):
        return op.conv_gram(
            [u.x for u in convs], [u.b for u in convs], convs[0].geometry, precision
        )
    if gathers := _only(Gather, uses):
        return op.gather_gram([u.index for u in gathers], [u.values for u in gathers], precision)
    if commons := _only(Common, uses):
        scale = torch.block_diag(*(u.scale.to(WIDE) for u in commons))
        return scale @ op.row_gram([u.flat for u in commons]) @ scale.T
    if stacks := _only(Stacked, uses):
        return _gram_of_blocks(stacks, precision)
    return _mixed_gram(uses)


def _gram_of_blocks(uses: Sequence[Stacked], precision: str) -> Tensor:
    """`gram` of stacks: the sum over blocks, each of the rows that have it."""
    counts = [u.count for u in uses]
    found = uses[0].tensors[0].new_zeros(sum(counts), sum(counts), dtype=WIDE)
    rows = torch.arange(len(found), device=found.device).split(counts)
    for which, parts in _by_block(uses).values():
        at = torch.cat([rows[i] for i in which])
        found[at[:, None], at] += gram(parts, precision)
    return found


def _by_block(uses: Sequence[Stacked]) -> dict[int, tuple[list[int], list[Use]]]:
    """For each block that occurs, which of the uses have it, and their parts."""
    found: dict[int, tuple[list[int], list[Use]]] = {}
    for i, use in enumerate(uses):
        for e, part in zip(use.at, use.parts, strict=True):
            which, parts = found.setdefault(e, ([], []))
            which.append(i)
            parts.append(part)
    return found


def _cross_gram(uses: Sequence[Use], others: Sequence[Use], precision: str) -> Tensor:
    """The rows' inner products with those of aligned uses of another kind, float64 `[R, R']`."""
    if commons := _only(Common, uses):
        return torch.cat([
            u.scale.to(WIDE) @ torch.stack([_inner(others, d) for d in u.direction])
            for u in commons
        ])
    outers, gathers = _only(Outer, uses), _only(Gather, others)
    if not outers or not gathers:
        return _cross_gram(others, uses, precision).T
    sides = ([u.left for u in outers], [u.right for u in outers])
    return op.outer_gather(
        *sides, [u.index for u in gathers], [u.values for u in gathers], precision
    )


def _inner(uses: Sequence[Use], d: Tensor) -> Tensor:
    return torch.cat([u.inner(d.to(WIDE)) for u in uses])


def _mixed_gram(uses: Sequence[Use], known: int = 0) -> Tensor:
    """`gram` of aligned uses of any kinds, a tile of explicit rows at a time."""
    R, width, unit = sum(u.count for u in uses), prod(uses[0].shape), lcm(*(u.unit for u in uses))
    step = max(op.BUFFER // max(R * unit, 1), 1) * unit
    found = uses[0].tensors[-1].new_zeros(R, R, dtype=WIDE)
    for start in range(0, width, max(step, 1)):
        found += op.row_gram([u.columns(start, min(start + step, width)) for u in uses], known)
    return found


def route(uses: Sequence[Use]) -> str:
    """The route that `gram` takes for these uses, in words."""
    return " + ".join(_route(own) for _, own in _apart(uses)) if aligned(uses) else "explicit rows"


def _route(uses: Sequence[Use]) -> str:
    """The route of aligned uses of one kind."""
    if outers := _only(Outer, uses):
        return "outer, " + op.outer_route([u.left for u in outers], [u.right for u in outers])
    if convs := _only(Conv, uses):
        return "conv, " + op.conv_route(
            [u.x for u in convs], [u.b for u in convs], convs[0].geometry
        )
    if _only(Gather, uses):
        return "entries that occur"
    if stacks := _only(Stacked, uses):
        return "blocks: " + ", ".join(
            sorted({route(parts) for _, parts in _by_block(stacks).values()})
        )
    return "directions in common" if _only(Common, uses) else "explicit rows"


# ---- many parameters -----------------------------------------------------------------------------


def rank_one(uses: Sequence[Use]) -> list[Outer]:
    """The uses if their rows are outer products of one position in one space, else nothing."""
    outers = _only(Outer, uses) if aligned(uses) else []
    return outers if all(u.left.shape[1] == 1 for u in outers) else []


def rank_one_gram(
    parameters: Sequence[Sequence[Outer]], beside: Sequence[list[Use]]
) -> tuple[Tensor, list[list[Use]]]:
    """The sum of `gram` over parameters with uses of rank one by the same rows: one call for all of them.

    Parameters of explicit rows `beside` them that are a side of the outer products (a bias) join as
    products with 1, the products of that side being known; the others are handed back.
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
