"""Several uses of one parameter by the same rows become one use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from mtu_fast._rows.uses import Common, Dense, Gather, Outer, Several, Stacked, Use


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
        # behind unequal chains they meet in the parameter's own space only
        # J = Σ_u J_u: rows of one parameter add up over the places where it is used
        rows = reduce(torch.add, (u.grounded().rows for u in uses))
        return Dense(tuple(rows.shape[1:]), rows)
    kinds: dict[type[Use], list[Use]] = {}
    for use in uses:
        for part in parts_of(use):
            kinds.setdefault(type(part), []).append(part)
    one = sum_of([_merge_alike(alike) for alike in kinds.values()])
    return one.dense() if Dense in kinds else one


def aligned(uses: Sequence[Use]) -> bool:
    """Whether the uses share one chain and shape, so that they meet on this side of it."""
    if len(uses) == 1:
        return True
    shape, chain = uses[0].shape, uses[0].chain
    return all(u.shape == shape and (u.chain is chain or u.chain == chain) for u in uses[1:])


def parts_of(use: Use) -> tuple[Use, ...]:
    """The uses that a sum is made of."""
    return use.parts if isinstance(use, Several) else (use,)


def sum_of(parts: Sequence[Use]) -> Use:
    """One use for a sum of aligned ones, as they are."""
    first = parts[0]
    return first if len(parts) == 1 else Several(first.shape, tuple(parts), chain=first.chain)


def by_block(uses: Sequence[Stacked]) -> dict[int, tuple[list[int], list[Use]]]:
    """For each block that occurs, which of the uses have it, and their parts."""
    found: dict[int, tuple[list[int], list[Use]]] = {}
    for i, use in enumerate(uses):
        for e, part in zip(use.at, use.parts, strict=True):
            which, parts = found.setdefault(e, ([], []))
            which.append(i)
            parts.append(part)
    return found


def _merge_alike(uses: Sequence[Use]) -> Use:
    """`merge` of aligned uses of one kind."""
    if len(uses) == 1:
        return uses[0]
    return _MERGES.get(type(uses[0]), _merge_rows)(uses)


def _merge_rows(uses: Sequence[Use]) -> Use:
    first = uses[0]
    rows = reduce(torch.add, (u.matrix() for u in uses))
    return Dense(first.shape, rows.view(first.count, *first.shape), chain=first.chain)


def _merge_positions(uses: Sequence[Use]) -> Use:
    """Where rows are sums over positions, those of all positions together."""
    sides = zip(*(u.tensors for u in uses), strict=True)
    # Σ_s over S positions and Σ_t over T are one sum over S + T: `[R, S + T, …]`
    return uses[0].with_tensors(*(torch.cat(side, 1) for side in sides))


def _merge_lookups(uses: Sequence[Gather]) -> Gather:
    found = _merge_positions(uses)
    assert isinstance(found, Gather)
    return replace(found, sparse=all(u.sparse for u in uses))


def _merge_directions(uses: Sequence[Common]) -> Common:
    # S D + T E = [S T] [D; E]
    scale = torch.cat([u.scale for u in uses], 1)
    direction = torch.cat([u.direction for u in uses])
    return replace(uses[0], scale=scale, direction=direction)


def _merge_stacks(uses: Sequence[Stacked]) -> Stacked:
    blocks = by_block(uses)
    parts = tuple(merge(of_block) for _, of_block in blocks.values())
    return replace(uses[0], parts=parts, at=tuple(blocks))


_MERGES: dict[type[Use], Callable[[Sequence[Any]], Use]] = {
    Outer: _merge_positions,
    Gather: _merge_lookups,
    Common: _merge_directions,
    Stacked: _merge_stacks,
}
