"""What is kept of a use across steps: its factors, where they are few and cheap to multiply, or else explicit rows.

Let a step have n rows of its own beside 4 n kept ones, as many as a memory holds by default. Factors
are kept where they take fewer bytes than the rows, and where the Gram of all 5 n rows by factors and
their combination cost no more than products of n explicit rows with all others, each element read
for these and for the combination (`Prices`). They are the smaller by far of few positions: of one
row of a linear layer S (A + B) numbers in place of A B. Where bytes are scarce they alone decide.

Not of parameters of few numbers, whose explicit rows are multiplied together in one call; nor behind
views of a parameter, which are known to the step's graph alone; nor where kinds of use meet in a
parameter, but for a table that is looked up and multiplied with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtu_fast._ops.gram import prices
from mtu_fast._rows.merge import parts_of
from mtu_fast._rows.products import must_be_formed, work
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast._rows.uses import DIRECT, Conv, Gather, Outer, Several, Use

FEW = 1 << 13  # numbers of a row: of fewer, calls cost more than the work
HELD = 4  # kept rows for each of a step's own, by which costs are judged
# Kinds of which factors are kept, `[R, positions, ...]` each; and those that a table may have together.
FACTORS, OF_TABLES = (Outer, Conv, Gather), (Outer, Gather)

Factors = Mapping[int, Use]  # parameter -> the use of all rows that are kept


def keeps_factors(use: Use, count: int, smallest: bool = False) -> bool:
    """Whether factors of a use are kept, of a step that keeps so many rows of its own.

    smallest: whatever their products cost.
    """
    few = prod(use.shape) <= FEW or not count or not use.count
    if few or use.chain != DIRECT or not _has_factors(use):
        return False
    if use.held >= use.rows_bytes():
        return False
    return smallest or _cost_of_factors(use, (1 + HELD) * count) <= _cost_of_rows(use, count)


def keep_factors(uses: Sequence[Use | None], count: int, smallest: bool = False) -> bool:
    """Whether factors are kept of the uses of some rows, None for rows of zeros: of all of them, or of none."""
    return all(use is None or keeps_factors(use, count, smallest) for use in uses)


def _has_factors(use: Use) -> bool:
    parts = parts_of(use)
    return all(isinstance(part, OF_TABLES if len(parts) > 1 else FACTORS) for part in parts)


def _cost_of_factors(use: Use, rows: int) -> float:
    """A Gram and a combination of so many rows by factors."""
    # only sizes are asked for: no row of these is there
    many = use.with_tensors(*(t[:1].expand(rows, *t.shape[1:]) for t in use.tensors))
    if must_be_formed([many]):
        return inf
    return work(many) + rows * _summed(use)


def _cost_of_rows(use: Use, own: int) -> float:
    """Products of a step's rows, which are formed, with one another and with kept ones, which are read twice."""
    price, rows = prices(use.tensors[0].device), (1 + HELD) * own
    products = price.row_product * (rows**2 - (rows - own) ** 2)
    return (products + price.row * rows) * prod(use.shape) + own * _summed(use)


def _summed(use: Use) -> float:
    """Multiply-adds of a row in a combination by factors, as many as it takes to form it."""
    if isinstance(use, Several):
        return sum(map(_summed, use.parts))
    if isinstance(use, Gather):
        return float(prod(use.values.shape[1:]))
    if isinstance(use, Conv):
        positions = use.b.shape[1] * prod(use.b.shape[3:])
        return float(positions * prod(use.shape))
    return float(use.tensors[0].shape[1] * prod(use.shape))


def end_to_end(uses: Sequence[Use | None], counts: Sequence[int]) -> Use | None:
    """One use of the rows of several, None for rows of zeros; None where they have no factors in common.

    Args:
        uses: of the rows of each.
        counts: how many rows.
    """
    some = [use for use in uses if use is not None]
    first = some[0]
    if not _has_factors(first) or not all(_alike(use, first) for use in some[1:]):
        return None
    every = [use or zeros(first, n) for use, n in zip(uses, counts, strict=True)]
    sides = zip(*(use.tensors for use in every), strict=True)
    return first.with_tensors(*map(_laid_end_to_end, sides))


def _laid_end_to_end(blocks: Sequence[Tensor]) -> Tensor:
    """Sides `[R_i, S_i, ...]` as `[ΣR, S, ...]`."""
    positions = max(t.shape[1] for t in blocks)
    padded = [_with_positions(t, positions) for t in blocks]
    return padded[0] if len(padded) == 1 else torch.cat(padded)


def zeros(like: Use, count: int) -> Use:
    """So many rows of zeros in the form of a use."""
    return like.with_tensors(*(t.new_zeros(count, *t.shape[1:]) for t in like.tensors))


def _alike(use: Use, first: Use) -> bool:
    """Whether two uses differ in their rows and positions alone."""
    if _kinds(use) != _kinds(first) or use.with_tensors(*first.tensors) != first:
        return False
    sizes = zip(use.tensors, first.tensors, strict=True)
    return all(t.shape[2:] == u.shape[2:] and t.dtype == u.dtype for t, u in sizes)


def _kinds(use: Use) -> list[type[Use]]:
    return [type(part) for part in parts_of(use)]


def _with_positions(t: Tensor, positions: int) -> Tensor:
    """`[R, S, ...]` with zeros for positions that are not there."""
    missing = positions - t.shape[1]
    return pad(t, [0, 0] * (t.dim() - 2) + [0, missing]) if missing else t


def factors_of(
    parts: Sequence[TaskRows], at: Sequence[Tensor], smallest: bool = False
) -> dict[int, Use]:
    """{parameter: the use of some rows}, in memory of its own, of the parameters that are kept as factors.

    Args:
        parts: of the rows.
        at: which rows of each, int64.
        smallest: see `keeps_factors`.
    """
    some = [(part, rows) for part, rows in zip(parts, at, strict=True) if len(rows)]
    chosen = [rows for _, rows in some]
    found: dict[int, Use] = {}
    for j in sorted({j for part, _ in some for j in part.uses}):
        whole = _kept_of([part.uses.get(j) for part, _ in some], chosen, smallest)
        if whole is not None:
            found[j] = whole
    return found


def _kept_of(uses: Sequence[Use | None], at: Sequence[Tensor], smallest: bool) -> Use | None:
    """The use of some rows of one parameter; None where they are to be explicit."""
    counts = list(map(len, at))
    if not keep_factors(uses, sum(counts), smallest):
        return None
    chosen: list[Use | None] = []
    for use, rows in zip(uses, at, strict=True):
        chosen.append(None if use is None else use.select(rows))
    return end_to_end(chosen, counts)


def row_bytes(factors: Factors, shared: Shared, itemsize: int) -> int:
    """Bytes of a row: of its factors, and of a number for each of all other parameters."""
    explicit = sum(p.numel() for j, p in enumerate(shared.parameters) if j not in factors)
    return explicit * itemsize + sum(use.held // use.count for use in factors.values())
