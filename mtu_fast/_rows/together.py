"""Products of many parameters in one call, where a call costs more than the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from mtu_fast._ops import gram as op
from mtu_fast._ops._blocks import cast, memory
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
    for some in _portions(parameters):
        yield _joined(some)


def sums(
    parameters: Sequence[Sequence[Use]], weights: Sequence[Tensor], dtype: torch.dtype | None
) -> list[Tensor]:
    """`Σ_i Σ_r w_i[r] row_i[r]` of each of several parameters with small uses by the same rows, each `[P]`.

    Args:
        parameters: the uses of each.
        weights: w of each block of rows, in the precision of the sums.
        dtype: what the sums are rounded to; None to leave them.

    Returns:
        Vectors in memory of their own.
    """
    found: list[Tensor] = []
    for some in _portions(parameters):
        pairs = zip(weights, _joined(some), strict=True)
        # [R_i] @ [R_i, ΣP]
        total = reduce(torch.add, (w @ cast(rows, w.dtype) for w, rows in pairs))
        total = cast(total, dtype or total.dtype)
        widths = [rows[0].shape[1] for rows in some]
        # torch's stub says that it returns nothing
        parts: list[Tensor] = torch.split_with_sizes_copy(total, widths)  # type: ignore[func-returns-value, assignment]
        found += parts
    return found


def _joined(parameters: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Rows `[R_i, P]` of each parameter as `[R_i, ΣP]` per block."""
    if len(parameters) == 1:
        return list(parameters[0])
    return [torch.cat(block, 1) for block in zip(*parameters, strict=True)]


def _portions(parameters: Sequence[Sequence[Use]]) -> Iterator[list[list[Tensor]]]:
    """Rows `[R_i, P]` of the uses of each parameter, some parameters at a time: joined they are a copy."""
    some: list[list[Tensor]] = []
    taken = 0
    for uses in parameters:
        rows = [use.matrix() for use in uses]
        size = sum(t.numel() for t in rows)
        if some and taken + size > buffer(rows[0].device):
            yield some
            some, taken = [], 0
        some.append(rows)
        taken += size
    if some:
        yield some
