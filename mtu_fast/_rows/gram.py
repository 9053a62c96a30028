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
from mtu_fast._rows.uses import Dense, Outer, Use

WAITING = 1 << 17  # numbers of Grams that wait to be added together: 1 MiB
FEW = 1 << 10  # of one Gram: on a CPU, a call each takes less than joining larger ones


@dataclass
class _Waiting:
    """Parameters whose products go in one call, by the rows that have them."""

    small: dict[Spans, list[list[Use]]] = field(default_factory=dict)
    met: dict[tuple[Spans, together.Layout], list[list[Outer]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sum:
    """The Gram that products are added to: of all rows, or of rows of which some are summed.

    Attributes:
        gram: what was added.
        pool: which of the rows are summed.
        parts: Grams of all rows that wait to be added by one call, since each is a launch on a GPU.
    """

    gram: Tensor
    pool: Pool | None
    parts: list[Tensor] = field(default_factory=list)

    def into(self, spans: Spans) -> Into:
        """Which of their rows in the Gram each of these rows is; nothing where that is itself."""
        return () if self.pool is None else self.pool.of(spans)[0]

    def add(self, spans: Spans, part: Tensor) -> None:
        """Add the Gram of these rows, summed as `into` says."""
        if part.shape == self.gram.shape:
            if part.numel() > FEW and part.device.type == "cpu":
                self.gram.add_(part)
                return
            self.parts.append(part)
            if len(self.parts) * part.numel() > WAITING:
                self.finish()
            return
        if self.pool is not None:
            at = self.pool.of(spans)[1]
        else:
            at = torch.cat([torch.arange(*span, device=part.device) for span in spans])
        # rows of these spans only: a block of G, or several
        self.gram[at[:, None], at] += part

    def finish(self) -> None:
        """Add what waits."""
        if len(self.parts) == 1:
            self.gram.add_(self.parts[0])
        elif self.parts:
            # along the last dimension: over the first one a CPU adds some columns in another order than the rest,
            # and G would not be its own mirror image
            self.gram.add_(torch.stack(self.parts, -1).sum(-1))
        self.parts.clear()


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
    known = _add_known(gram, parts, group, precision)
    add_fresh(gram, parts, group, precision, pool, known)


def add_fresh(
    gram: Tensor,
    parts: Sequence[TaskRows],
    group: Sequence[int],
    precision: str,
    pool: Pool | None = None,
    known: int = 0,
) -> None:
    """`add_gram` without the products of the last `known` rows with one another."""
    # G = Σ_j J_j J_jᵀ over the parameters j of the group
    waiting, found = _Waiting(), _Sum(gram, pool)
    last = sum(map(len, parts))
    for spans, uses in uses_of_each(parts, group).values():
        # what is known is of the last rows, which not every parameter has
        held = known if spans[-1][1] == last else 0
        _add_uses(found, waiting, spans, uses, precision, held)
    for (spans, layout), several in waiting.met.items():
        # biases are a side of their weights' outer products
        beside = waiting.small.get(spans, [])
        held = known if spans[-1][1] == last else 0
        part, waiting.small[spans] = together.gram_by_positions(several, beside, layout, held)
        found.add(spans, summed_gram(part, found.into(spans)))
    for spans, many in waiting.small.items():
        held = known if spans[-1][1] == last else 0
        for rows in together.side_by_side(many):
            found.add(spans, summed_gram(row_gram.unchecked(rows, held), found.into(spans)))
    found.finish()


def _add_uses(
    found: _Sum, waiting: _Waiting, spans: Spans, uses: list[Use], precision: str, held: int
) -> None:
    """Add the products of one parameter, or let them wait for others that go in one call with them."""
    if held and isinstance(uses[-1], Dense) and prod(uses[-1].shape) <= together.SMALL:
        uses = [use.grounded() for use in uses]
    if together.small(uses):
        waiting.small.setdefault(spans, []).append(uses)
    elif outers := together.by_positions(uses):
        waiting.met.setdefault((spans, together.Layout.of(outers)), []).append(outers)
    else:
        found.add(spans, products.gram(uses, precision, held, found.into(spans)))


def _add_known(
    gram: Tensor, parts: Sequence[TaskRows], group: Sequence[int], precision: str
) -> int:
    """Add the products of the last rows with themselves where a step before left them; how many rows, 0 if not."""
    tail = _kept(parts)
    if not tail:
        return 0
    known = known_gram(tail, group, precision)
    gram[-len(known) :, -len(known) :] += known
    return len(known)


def known_gram(tail: Sequence[TaskRows], group: Sequence[int], precision: str) -> Tensor:
    """M Mᵀ of kept rows M, which no step changes: made once, and held with the last of them."""
    held = tail[-1].grams
    key, count = tuple(group), sum(map(len, tail))
    if key not in held:
        made = tail[-1].roles.loss.new_zeros(count, count)
        add_fresh(made, tail, group, precision)
        held[key] = made
    return held[key]


def _kept(parts: Sequence[TaskRows]) -> list[TaskRows]:
    """All parts in memory, which are the last and reach the same parameters, or the last part, beside others.

    Their products are worth keeping where they are in memory, or persistent and explicit; else
    nothing.
    """
    tail = [part for part in parts if part.matrix is not None]
    if not tail and parts[-1].persistent and not parts[-1].factors:
        tail = [parts[-1]]
    return tail if len(tail) < len(parts) and len(parts[-1]) else []
