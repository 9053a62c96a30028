"""`G = J Jᵀ` of rows laid end to end: a sum over parameters, taken together where that saves calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from mtu_fast._ops.gram import row_gram
from mtu_fast._rows import products, together
from mtu_fast._rows.task_rows import Spans, TaskRows, uses_of
from mtu_fast._rows.uses import Outer, Use


@dataclass
class _Waiting:
    """Parameters whose products go in one call, by the rows that have them."""

    small: dict[Spans, list[list[Use]]] = field(default_factory=dict)
    rank_one: dict[Spans, list[list[Outer]]] = field(default_factory=dict)


def add_gram(gram: Tensor, parts: Sequence[TaskRows], group: Sequence[int], precision: str) -> None:
    """Add the Gram of a group of parameters to `gram`.

    Args:
        gram: float64 `[R, R]`.
        parts: the R rows.
        group: indices of the parameters.
        precision: see `Engine`.
    """
    known = _add_known(gram, parts, group)
    waiting = _Waiting()
    for j in group:
        spans, uses = uses_of(parts, j)
        if not uses:
            continue
        reaches_the_last = spans[-1][1] == len(gram)
        held = known if reaches_the_last else 0
        if held and prod(uses[-1].shape) <= together.SMALL:
            uses = [use.grounded() for use in uses]
        if together.small(uses):
            waiting.small.setdefault(spans, []).append(uses)
        elif held:
            _add(gram, spans, products.gram(uses, precision, held))
        elif outers := together.rank_one(uses):
            waiting.rank_one.setdefault(spans, []).append(outers)
        else:
            _add(gram, spans, products.gram(uses, precision))
    _add_waiting(gram, waiting, known)


def _add_waiting(gram: Tensor, waiting: _Waiting, known: int) -> None:
    small = waiting.small
    for spans, outers in waiting.rank_one.items():
        part, small[spans] = together.rank_one_gram(outers, small.get(spans, []))
        _add(gram, spans, part)
    for spans, many in small.items():
        held = known if spans[-1][1] == len(gram) else 0
        for rows in together.side_by_side(many):
            _add(gram, spans, row_gram(rows, held))


def _add_known(gram: Tensor, parts: Sequence[TaskRows], group: Sequence[int]) -> int:
    """Add the last part's products with itself where a step before left them; its rows, 0 if not.

    They are kept of a part that is persistent and explicit, from its first step on.
    """
    last = parts[-1]
    if len(parts) == 1 or not last.persistent or not last.is_dense():
        return 0
    key = tuple(group)
    if key not in last.grams:
        found = gram.new_zeros(len(last), len(last))
        for j in group:
            if j in last.uses:
                found += row_gram([last.uses[j].grounded().matrix()])
        last.grams[key] = found
    gram[-len(last) :, -len(last) :] += last.grams[key]
    return len(last)


def _add(gram: Tensor, spans: Spans, part: Tensor) -> None:
    if part.shape == gram.shape:
        gram += part
        return
    at = torch.cat([torch.arange(*span, device=gram.device) for span in spans])
    gram[at[:, None], at] += part
