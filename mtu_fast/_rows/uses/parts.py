"""What is made of other uses by the same rows: their sum, or a stack of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from math import lcm, prod

import torch
from torch import Tensor

from mtu_fast._rows.uses.base import Use


@dataclass(frozen=True)
class _Parts(Use):
    """What is made of other uses by the same rows."""

    parts: tuple[Use, ...]

    @property
    def count(self) -> int:
        return self.parts[0].count

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for part in self.parts for t in part.tensors)

    def with_tensors(self, *tensors: Tensor) -> _Parts:
        parts, start = [], 0
        for part in self.parts:
            stop = start + len(part.tensors)
            parts.append(part.with_tensors(*tensors[start:stop]))
            start = stop
        return replace(self, parts=tuple(parts))

    def select(self, rows: Tensor) -> _Parts:
        return replace(self, parts=tuple(part.select(rows) for part in self.parts))

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, (part.dtype for part in self.parts))

    def rows_pay(self) -> bool:
        return any(part.rows_pay() for part in self.parts)


@dataclass(frozen=True)
class Several(_Parts):
    """Rows that are sums over uses of the same rows in one space, of one shape and behind one chain: parts.

    What `merge.merge` makes of unequal kinds: a table that is looked up and multiplied with, a
    weight and a penalty.
    """

    def matrix(self) -> Tensor:
        return reduce(torch.add, (part.matrix() for part in self.parts))

    @property
    def unit(self) -> int:
        return lcm(*(part.unit for part in self.parts))

    def columns(self, start: int, stop: int) -> Tensor:
        found = self.tensors[0].new_zeros(self.count, stop - start, dtype=self.dtype)
        for part in self.parts:
            part.add_columns(found, start, stop)
        return found

    def weighted(self, w: Tensor | None) -> Tensor:
        return reduce(torch.add, (part.weighted(w) for part in self.parts))

    def lengths(self) -> Tensor:
        """At most this: the sum of those of the parts."""
        return reduce(torch.add, (part.lengths() for part in self.parts))

    def inner(self, d: Tensor) -> Tensor:
        return reduce(torch.add, (part.inner(d) for part in self.parts))


@dataclass(frozen=True)
class Stacked(_Parts):
    """Rows of a stack of E equal blocks, by uses of some of them: experts of which every token takes a few.

    shape (E, *block); `at` says which block each of the parts is of, no two of one. These have no
    chains of their own.
    """

    at: tuple[int, ...]

    def matrix(self) -> Tensor:
        return self.columns(0, prod(self.shape))

    @property
    def unit(self) -> int:
        return prod(self.shape[1:])

    def columns(self, start: int, stop: int) -> Tensor:
        # blocks without a part are zero
        there = dict(zip(self.at, self.parts, strict=True))
        none = self.tensors[0].new_zeros(self.count, self.unit, dtype=self.dtype)
        blocks = []
        for e in range(start // self.unit, stop // self.unit):
            blocks.append(there[e].matrix() if e in there else none)
        return torch.cat(blocks, 1)

    def weighted(self, w: Tensor | None) -> Tensor:
        dtype = self.dtype if w is None else torch.promote_types(self.dtype, w.dtype)
        found = self.tensors[0].new_zeros(self.shape, dtype=dtype)
        for e, part in zip(self.at, self.parts, strict=True):
            found[e] = part.weighted(w)
        return found

    def lengths(self) -> Tensor:
        # blocks do not overlap: ‖row‖² = Σ_e ‖block_e‖²
        squares = [part.lengths().square() for part in self.parts]
        return reduce(torch.add, squares).sqrt()

    def inner(self, d: Tensor) -> Tensor:
        return reduce(
            torch.add, (part.inner(d[e]) for e, part in zip(self.at, self.parts, strict=True))
        )
