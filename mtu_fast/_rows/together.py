"""Products of many parameters in one call, where a call costs more than the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mtu_fast._ops import gram as op
from mtu_fast._ops._blocks import cast, same
from mtu_fast._ops._tiles import buffer
from mtu_fast._rows.merge import aligned
from mtu_fast._rows.products import only
from mtu_fast._rows.uses import Dense, Gather, Outer, Several, Use
from mtu_fast._rows.uses.outer import flattened, positions_first

# Numbers of a row: below, calls cost more than the work, and parameters are taken together.
SMALL = 1 << 14


def is_table(use: Use) -> bool:
    """Whether a row is a large table of which other uses than its look-ups are known."""
    return (
        prod(use.shape) > SMALL
        and isinstance(use, Several)
        and any(isinstance(part, Gather) for part in use.parts)
    )


def by_positions(uses: Sequence[Use]) -> list[Outer]:
    """The uses if their rows are sums of outer products in one space that are met position by position, else nothing.

    Those of one position are. Of more, where products of all positions cost so little more than what
    else there is that a call saved pays for it, and all rows have as many.
    """
    if type(uses[0]) is not Outer:
        return []
    outers = only(Outer, uses) if aligned(uses) else []
    return outers if outers and _meet_together(outers) else []


def _meet_together(outers: Sequence[Outer]) -> bool:
    """Whether products of all positions are made, by one call for several parameters."""
    positions = outers[0].left.shape[1]
    # an expert that no token takes has none
    if positions < 1 or any(u.left.shape[1] != positions for u in outers):
        return False
    return positions == 1 or op.meet_together([u.left for u in outers], [u.right for u in outers])


def multiplies(use: Use) -> bool:
    """Whether rows of this use are multiplied one by one: neither few numbers nor rank-one factors."""
    if isinstance(use, Outer) and use.left.shape[1] == 1:
        return False
    return not (isinstance(use, Dense) and prod(use.shape) <= SMALL)


class Layout(NamedTuple):
    """How sides `[R, S, width]` lie in memory that are met position by position.

    Attributes:
        positions: S.
        first: whether positions come first, and rows within them.
    """

    positions: int
    first: bool

    @staticmethod
    def of(uses: Sequence[Outer]) -> Layout:
        """That of all uses."""
        positions = uses[0].left.shape[1]
        return Layout(positions, all(positions_first(use.left, use.right) for use in uses))


def gram_by_positions(
    parameters: Sequence[Sequence[Outer]],
    beside: Sequence[list[Use]],
    layout: Layout,
    known: int = 0,
) -> tuple[Tensor, list[list[Use]]]:
    """The sum of `gram` over parameters that meet position by position in the same rows: one call for all of them.

    Parameters of explicit rows `beside` them that are a side of the outer products (a bias) join as
    products with 1, the products of that side being known; the others are handed back. Products of
    the last `known` rows with one another are left out.
    """
    pairs = [_sides(uses, layout) for uses in parameters]
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
    gram = op.rank_one_gram.unchecked(left, right, count, known * layout.positions)
    if layout.positions > 1:
        # G[r, q] = Σ_{s,u} (left_rs · left_qu) (right_rs · right_qu)
        counts = [use.count for use in parameters[0]]
        gram = _positions_summed(_positions_summed(gram, counts, layout).T, counts, layout)
    return gram, others


def _positions_summed(gram: Tensor, counts: Sequence[int], layout: Layout) -> Tensor:
    """`[R, …]` of `[R·S, …]`, blocks of so many rows one after the other."""
    if not layout.first:
        return gram.view(-1, layout.positions, gram.shape[1]).sum(1)
    blocks = gram.split([layout.positions * count for count in counts])
    sums = [block.view(layout.positions, -1, gram.shape[1]).sum(0) for block in blocks]
    return torch.cat(sums) if len(sums) > 1 else sums[0]


_Sides = tuple[list[Tensor], list[Tensor]]


def _biases(
    pairs: Sequence[_Sides], beside: Sequence[list[Use]]
) -> tuple[dict[int, list[_Sides]], list[list[Use]]]:
    """By the pair whose side they are, explicit rows as products with 1; and those that are no side."""
    of_side: dict[tuple[int, ...], tuple[int, Sequence[Tensor]]] = {}
    for at, pair in enumerate(pairs):
        for side in pair:
            of_side[_begin(side)] = at, side
    one = pairs[0][0][0].new_ones(())
    found: dict[int, list[_Sides]] = {}
    others = []
    for uses in beside:
        rows = [use.matrix() for use in uses]
        at, known = of_side.get(_begin(rows), (0, ()))
        if known and all(map(same, rows, known)):
            # one number for all: the products of ones are made once
            ones = [one.expand(len(t), 1) for t in rows]
            found.setdefault(at, []).append((rows, ones))
        else:
            others.append(uses)
    return found, others


def _begin(side: Sequence[Tensor]) -> tuple[int, ...]:
    """Where the blocks of a side begin in memory."""
    return tuple([t.data_ptr() for t in side])


def _sides(uses: Sequence[Outer], layout: Layout) -> _Sides:
    first = layout.first
    return [flattened(u.left, first) for u in uses], [flattened(u.right, first) for u in uses]


def small(uses: Sequence[Use]) -> bool:
    """Whether the uses are few explicit numbers a row in one space: taken together with others (`side_by_side`)."""
    first = uses[0]
    if type(first) is not Dense or prod(first.shape) > SMALL:
        return False
    return len(uses) == 1 or (bool(only(Dense, uses)) and aligned(uses))


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
