"""Tables that are looked up: entries and their gradients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mtu_fast._later import is_host
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops._sums import summed_at
from mtu_fast._ops.explicit import gather_inner, gather_rows
from mtu_fast._rows.uses.base import Use, weigh
from mtu_fast._rows.uses.sketch import signs, sketched


@dataclass(frozen=True)
class Gather(Use):
    """Rows of a table, scattered: index `[R, S]` into V, values `[R, S, D]`, shape (V, …) of V entries of D numbers.

    sparse: an ordinary backward gives a sparse gradient of this table.
    """

    index: Tensor
    values: Tensor
    sparse: bool = field(default=False, kw_only=True)

    @property
    def count(self) -> int:
        return self.index.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.index, self.values)

    def with_tensors(self, *tensors: Tensor) -> Gather:
        index, values = tensors
        return replace(self, index=index, values=values)

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.values)

    def matrix(self) -> Tensor:
        return gather_rows(self.index, self.values, self.shape[0]).flatten(1)

    def weighted(self, w: Tensor | None) -> Tensor:
        values = weigh(self.values, w)
        # rows are summed where they are looked up; no row of the table's size is formed
        found = summed_at(self.index.flatten(), values.flatten(0, 1), self.shape[0])
        return found.view(self.shape)

    @property
    def unit(self) -> int:
        return self.values.shape[2]

    def columns(self, start: int, stop: int) -> Tensor:
        found = self.values.new_zeros(self.count, stop - start, dtype=self.dtype)
        self.add_columns(found, start, stop)
        return found

    def add_columns(self, found: Tensor, start: int, stop: int) -> None:
        first, count = start // self.unit, (stop - start) // self.unit
        inside = (self.index >= first) & (self.index < first + count)
        # [R, entries] as one table, so that one sum does
        rows = torch.arange(self.count, device=found.device)[:, None]
        entries = rows * count + self.index - first
        table = found.view(-1, self.unit)
        if is_host(found.device):
            # only what falls into these columns is read: there may be many tiles of them
            entries, values, size = entries[inside], self.values[inside], len(table)
        else:
            # how many fall there would be waited for: the others meet behind the table
            size = len(table) + 1
            entries = torch.where(inside, entries, len(table)).flatten()
            values = self.values.flatten(0, 1)
        table += summed_at(entries, values.to(found.dtype), size)[: len(table)]

    def lengths(self) -> Tensor:
        """Of some signed sums of the row's entries."""
        values = self.values.to(self.dtype)
        of_entries = signs(self.shape[0], values)[self.index]  # [R, S, SKETCH]
        # [R, SKETCH, S] @ [R, S, D]
        return sketched(of_entries.mT @ values)

    def inner(self, d: Tensor) -> Tensor:
        return gather_inner(self.index, self.values, d.view(self.shape[0], self.unit))
