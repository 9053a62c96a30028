"""Products of many parameters in one call, where a call costs more than the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from mtu_fast._ops import gram as op
from mtu_fast._ops._blocks import memory
from mtu_fast._ops._tiles import buffer
from mtu_fast._rows.merge import aligned
from mtu_fast._rows.products import only
from mtu_fast._rows.uses import Dense, Gather, Outer, Several, Use

# Numbers of a row: below, calls cost more than the work, and parameters are taken together.
SMALL = 1 << 14


def is_table(use: Use) -> bool:
    """Whether a row is a large table of which other uses than its look-ups are known."""
    return (
        prod(use.shape) > SMALL
        and isinstance(use, Several)
        and any(isinstance(part, Gather) for part in use.parts)
    )


def rank_one(uses: Sequence[Use]) -> list[Outer]:
    """The uses if their rows are outer products of one position in one space, else nothing."""
    outers = only(Outer, uses) if aligned(uses) else []
    return outers if all(u.left.shape[1] == 1 for u in outers) else []


def multiplies(use: Use) -> bool:
    """Whether rows of this use are multiplied one by one: neither few numbers nor rank-one factors."""
    if isinstance(use, Outer) and use.left.shape[1] == 1:
        return False
    return not (isinstance(use, Dense) and prod(use.shape) <= SMALL)


def rank_one_gram(
    parameters: Sequence[Sequence[Outer]], beside: Sequence[list[Use]], known: int = 0
) -> tuple[Tensor, list[list[Use]]]:
    """The sum of `gram` over parameters with uses of rank one by the same rows: one call for all of them.

    Parameters of explicit rows `beside` them that are a side of the outer products (a bias) join as
    products with 1, the products of that side being known; the others are handed back. Products of
    the last `known` rows with one another are left out.
    """
    pairs = [_sides(uses) for uses in parameters]
    biases, others = _biases(pairs, beside)
    left: list[Tensor] = []
    right: list[Tensor] = []
    count = 0
    # a bias has the rows of one side: (b ⊗ 1), where the weight has (b ⊗ a)
    for at, pair in enumerate(pairs):
        # A bias right behind its weight: the products of their side need not be held for long.
        for of_left, of_right in (pair, *biases.get(at, ())):
            left += of_left
            right += of_right
            count += 1
    return op.rank_one_gram.unchecked(left, right, count, known), others


_Sides = tuple[list[Tensor], list[Tensor]]


def _biases(
    pairs: Sequence[_Sides], beside: Sequence[list[Use]]
) -> tuple[dict[int, list[_Sides]], list[list[Use]]]:
    """By the pair whose side they are, explicit rows as products with 1; and those that are no side."""
    of_side: dict[object, int] = {}
    for at, pair in enumerate(pairs):
        for side in pair:
            of_side[_memory(side)] = at
    one = pairs[0][0][0].new_ones(())
    found: dict[int, list[_Sides]] = {}
    others = []
    for uses in beside:
        rows = [use.matrix() for use in uses]
        known = of_side.get(_memory(rows))
        if known is None:
            others.append(uses)
        else:
            # one number for all: the products of ones are made once
            ones = [one.expand(len(t), 1) for t in rows]
            found.setdefault(known, []).append((rows, ones))
    return found, others


def _memory(side: Sequence[Tensor]) -> object:
    return tuple(map(memory, side))


def _sides(uses: Sequence[Outer]) -> _Sides:
    return [u.left[:, 0] for u in uses], [u.right[:, 0] for u in uses]


def small(uses: Sequence[Use]) -> bool:
    """Whether the uses are few explicit numbers a row in one space: taken together with others (`side_by_side`)."""
    return bool(only(Dense, uses)) and prod(uses[0].shape) <= SMALL and aligned(uses)


def side_by_side(parameters: Sequence[Sequence[Use]]) -> Iterator[list[Tensor]]:
    """The rows of small uses of parameters by the same rows, joined to `[R_i, ΣP]` per block, some at a time."""
    some: list[list[Tensor]] = []
    taken = 0
    for uses in parameters:
        rows = [use.matrix() for use in uses]
        taken += sum(t.numel() for t in rows)
        # bounded, since the joined rows are a copy
        if some and taken > buffer(rows[0].device):
            yield [torch.cat(block, 1) for block in zip(*some, strict=True)]
            some, taken = [], sum(t.numel() for t in rows)
        some.append(rows)
    if some:
        yield [torch.cat(block, 1) for block in zip(*some, strict=True)]
