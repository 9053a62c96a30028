"""`G = J Jᵀ` of rows laid end to end: a sum over parameters, taken together where that saves calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from mtu_fast._ops._pooling import Into, summed_gram
from mtu_fast._ops.gram import row_gram
from mtu_fast._rows import products, together
from mtu_fast._rows.pool import Pool
from mtu_fast._rows.task_rows import Spans, TaskRows, uses_of_each
from mtu_fast._rows.uses import Outer, Use


@dataclass
class _Waiting:
    """Parameters whose products go in one call, by the rows that have them."""

    small: dict[Spans, list[list[Use]]] = field(default_factory=dict)
    rank_one: dict[Spans, list[list[Outer]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sum:
    """The Gram that products are added to: of all rows, or of rows of which some are summed."""

    gram: Tensor
    pool: Pool | None

    def into(self, spans: Spans) -> Into:
        """Which of their rows in the Gram each of these rows is; nothing where that is itself."""
        return () if self.pool is None else self.pool.of(spans)[0]

    def add(self, spans: Spans, part: Tensor) -> None:
        """Add the Gram of these rows, summed as `into` says."""
        if part.shape == self.gram.shape:
            self.gram.add_(part)
            return
        if self.pool is not None:
            at = self.pool.of(spans)[1]
        else:
            at = torch.cat([torch.arange(*span, device=part.device) for span in spans])
        # rows of these spans only: a block of G, or several
        self.gram[at[:, None], at] += part


def add_gram(
    gram: Tensor,
    parts: Sequence[TaskRows],
    group: Sequence[int],
    precision: str,
    pool: Pool | None = None,
) -> None:
    """Add the Gram of a group of parameters to `gram`.

    Args:
        gram: float64 `[R, R]`; `[V, V]` with a pool.
        parts: the R rows.
        group: indices of the parameters.
        precision: see `Engine`.
        pool: which of the rows are summed; None for none.
    """
    # G = Σ_j J_j J_jᵀ over the parameters j of the group
    known = _add_known(gram, parts, group)
    waiting, found = _Waiting(), _Sum(gram, pool)
    last = sum(map(len, parts))
    for spans, uses in uses_of_each(parts, group).values():
        # what is known is of the last rows, which not every parameter has
        held = known if spans[-1][1] == last else 0
        _add_uses(found, waiting, spans, uses, precision, held)
    for spans, several in waiting.rank_one.items():
        # biases are a side of their weights' outer products
        beside = waiting.small.get(spans, [])
        part, waiting.small[spans] = together.rank_one_gram(several, beside)
        found.add(spans, summed_gram(part, found.into(spans)))
    for spans, many in waiting.small.items():
        held = known if spans[-1][1] == last else 0
        for rows in together.side_by_side(many):
            found.add(spans, summed_gram(row_gram.unchecked(rows, held), found.into(spans)))


def _add_uses(
    found: _Sum, waiting: _Waiting, spans: Spans, uses: list[Use], precision: str, held: int
) -> None:
    """Add the products of one parameter, or let them wait for others that go in one call with them."""
    if held and prod(uses[-1].shape) <= together.SMALL:
        uses = [use.grounded() for use in uses]
    if together.small(uses):
        waiting.small.setdefault(spans, []).append(uses)
    elif not held and (outers := together.rank_one(uses)):
        waiting.rank_one.setdefault(spans, []).append(outers)
    else:
        found.add(spans, products.gram(uses, precision, held, found.into(spans)))


def _add_known(gram: Tensor, parts: Sequence[TaskRows], group: Sequence[int]) -> int:
    """Add the products of the last rows with themselves where a step before left them; how many rows, 0 if not."""
    tail = _kept(parts)
    if not tail:
        return 0
    last = parts[-1]
    key, count = tuple(group), sum(map(len, tail))
    if key not in last.grams:
        # M Mᵀ of the kept rows M, which no step changes
        found = gram.new_zeros(count, count)
        for j in group:
            if j in last.uses:
                found += row_gram([part.uses[j].grounded().matrix() for part in tail])
        last.grams[key] = found
    gram[-count:, -count:] += last.grams[key]
    return count


def _kept(parts: Sequence[TaskRows]) -> list[TaskRows]:
    """The last part, or all in memory, which are the last and reach the same parameters, beside others; else nothing.

    Their products are worth keeping where they are persistent and explicit.
    """
    tail = [part for part in parts if part.matrix is not None] or [parts[-1]]
    if len(tail) == len(parts) or not len(parts[-1]):
        return []
    return tail if all(part.persistent and part.is_dense() for part in tail) else []
