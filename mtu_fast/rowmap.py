"""Which row does an element of an output gradient belong to?

Backward passes are linear in the row weights, and scaling by a power of two is exact in floating point. A pass under
weights `2**digit(row)` therefore returns, bit by bit, `2**digit` times the pass under ones wherever a single row
reaches an element. Where several rows meet it does not, but for chance (weights 2, 0, 1 on rows 0, 1, 2 look like row
1), which a pass under irregular weights rules out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NO_ROW, UNCLEAR = -1, -2  # instead of a row: no gradient here; one that is not finite


@dataclass(frozen=True)
class RowMap:
    """Which row each element of an output gradient belongs to.

    Attributes:
        ids: int64, -1 where no row reaches. `[D]` along `dim`, or of the gradient's whole shape where dim is None.
        count: the number of rows N.
        dim: the one dimension the row depends on, or None.
        inner: A where position i belongs to row `i // A % N` (sample-major: A = S, sample-minor: A = 1); 0 where the
            rows follow no such order.
        gaps: True where some positions had no gradient when the map was made.
        ambiguous: True where another dimension would tell the rows apart as well, in this batch.
        rival: True where it would do so in an order of its own.
    """

    ids: Tensor
    count: int
    dim: int | None
    inner: int
    gaps: bool
    ambiguous: bool = False
    rival: bool = False

    @staticmethod
    def along(ids: Tensor, dim: int, count: int) -> RowMap:
        """The map of ids `[D]` along one dimension."""
        known, unclear = ids >= 0, ids == UNCLEAR
        index = torch.arange(len(ids), device=ids.device)
        positions = len(ids) // count if len(ids) % count == 0 else 0
        orders = (a for a in range(positions, 0, -1) if positions % a == 0)
        inner = next((a for a in orders if torch.equal(ids[known], (index // a % count)[known])), 0)
        order = index // inner % count if inner else torch.full_like(ids, NO_ROW)
        ids = torch.where(unclear, order, ids)
        return RowMap(ids, count, dim, inner, bool((ids < 0).any()))

    @staticmethod
    def elementwise(ids: Tensor, count: int) -> RowMap:
        """The map of ids of the gradient's own shape."""
        return RowMap(ids, count, None, 0, bool((ids < 0).any()))

    @property
    def ordered(self) -> bool:
        """Whether the rows follow one order, and every row has a gradient somewhere."""
        if not self.inner or self.rival:
            return False
        return not self.gaps or len(self.ids[self.ids >= 0].unique()) == self.count

    @property
    def regular(self) -> bool:
        """Whether the rows are ordered, and no other dimension tells them apart."""
        return self.ordered and not self.ambiguous

    def agrees(self, b: Tensor, weighted: Tensor, weights: Tensor) -> bool:
        """Whether the gradient under other row weights `[N]` is what this map says, to rounding."""
        said = torch.where(self._broadcast(b.dim()) < 0, 0, b) * self._weights(weights.to(b.dtype), b.dim())
        slack = min(256 * torch.finfo(b.dtype).eps, 2.0**-4)  # these weights do round
        size = b.abs() if self.dim is None else _lines(b, self.dim).abs().amax(1).view(self._broadcast(b.dim()).shape)
        allowed = slack * size.double() + _least(b.dtype)
        return bool((((weighted - said).abs() <= allowed) | ~torch.isfinite(size)).all())

    def _weights(self, weights: Tensor, ndim: int) -> Tensor:
        return weights[self._broadcast(ndim).clamp(min=0)]

    def filled(self, older: RowMap) -> RowMap:
        """This map with its gaps filled from an older one of the same graph signature."""
        if self.dim != older.dim or self.ids.shape != older.ids.shape:
            return self
        ids = torch.where(self.ids < 0, older.ids, self.ids)
        return RowMap.elementwise(ids, self.count) if self.dim is None else RowMap.along(ids, self.dim, self.count)

    def _broadcast(self, ndim: int) -> Tensor:
        if self.dim is None:
            return self.ids
        return self.ids.view([-1 if d == self.dim else 1 for d in range(ndim)])

    def only(self, b: Tensor, row: int) -> Tensor:
        """B with every element of another row set to zero."""
        return torch.where(self._broadcast(b.dim()) == row, b, 0)

    def fits(self, b: Tensor) -> bool:
        """Whether b is zero where this map knows no row; a map made from another batch may not."""
        return not self.gaps or not bool(torch.where(self._broadcast(b.dim()) < 0, b, 0).any())

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Positions along dim become (row, position within the row): `[…, D, …]` -> `[N, S, …]`.

        Rows in no order are padded with zeros to the longest.
        """
        x = x.movedim(dim, 0) if dim else x
        if self.inner:
            if len(x) == self.count * self.inner:
                return x.view(self.count, self.inner, *x.shape[1:])
            return x.unflatten(0, (-1, self.count, self.inner)).transpose(0, 1).flatten(1, 2)
        where = self._positions()
        inside = (where >= 0).view(*where.shape, *[1] * (x.dim() - 1))
        return torch.where(inside, x[where.clamp(min=0)], 0)

    def _positions(self) -> Tensor:
        """Positions of each row, `[N, S]`, -1 where a row has fewer than S."""
        of_row = [torch.nonzero(self.ids == r).flatten() for r in range(self.count)]
        return torch.nn.utils.rnn.pad_sequence(of_row, batch_first=True, padding_value=-1)


def digits(count: int, base: int, device: torch.device) -> list[Tensor]:
    """The base-`base` digits of the row numbers 0 … count - 1, lowest first: a list of int64 `[count]`."""
    rows = torch.arange(count, device=device)
    found = [rows % base]
    while base ** len(found) < count:
        found.append(rows // base ** len(found) % base)
    return found


def infer(b: Tensor, scaled: Sequence[Tensor], base: int, count: int) -> RowMap | None:
    """The row map of a gradient, or None where rows mix.

    Args:
        b: the gradient under row weights 1.
        scaled: the gradients under row weights `2**digit`, one per digit of the row number.
        base: the base of the digits.
        count: the number of rows N.
    """
    found = []
    shape, ndim = b.shape, b.dim()
    if b.is_complex():  # two real numbers of one row
        b, scaled = _parts(b), [_parts(s) for s in scaled]
    for dim in range(ndim):
        ids = _ids(_lines(b, dim), [_lines(s, dim) for s in scaled], base, count)
        if ids is not None:
            found.append(RowMap.along(ids, dim, count))
    if found:
        ordered = [m for m in found if m.inner]
        first = (ordered or found)[0]
        return replace(first, ambiguous=len(found) > 1 and count > 1, rival=len(ordered) > 1 and count > 1)
    elements = (shape.numel(), b.numel() // max(1, shape.numel()))
    ids = _ids(b.reshape(elements), [s.reshape(elements) for s in scaled], base, count)
    return None if ids is None else RowMap.elementwise(ids.view(shape).clamp(min=NO_ROW), count)


def uneven_weights(loss: Tensor) -> Tensor:
    """Irregular row weights in [1, 2): whole numbers of rows do not add up to one of them."""
    return 1 + (torch.arange(len(loss), device=loss.device, dtype=torch.float64) * 0.7548776662466927).frac().to(loss)


def _slack(dtype: torch.dtype) -> float:
    """What two exact passes may differ by, relative to a line of the gradient: sums taken in another order."""
    if dtype.itemsize > 2:
        return 64 * torch.finfo(dtype).eps
    return 8 * torch.finfo(dtype).eps if dtype == torch.float16 else 0.0  # small parts of a sum lose digits, see _least


def _least(dtype: torch.dtype) -> float:
    """What is rounded where numbers have no exponent left: at 6e-5 in float16, where gradients of a mean get."""
    return 16 * 2.0**-24 if dtype == torch.float16 else 0.0


def _parts(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj())


def _lines(t: Tensor, dim: int) -> Tensor:
    return t.movedim(dim, 0).reshape(t.shape[dim], -1)


def _ids(b: Tensor, scaled: Sequence[Tensor], base: int, count: int) -> Tensor | None:
    """The row of every line of b `[D, E]`; NO_ROW where it is zero, UNCLEAR where not finite; None where rows mix."""
    if b.numel() == 0:
        return None
    slack = _slack(b.dtype)
    size, at = b.abs().max(1)
    unclear = ~torch.isfinite(size)
    bound = slack * size.masked_fill(unclear, 0).double() + _least(b.dtype)
    empty = (size == 0) | unclear
    ids = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    for place, s in enumerate(scaled):
        ratio = (s.gather(1, at[:, None]) / b.gather(1, at[:, None]))[:, 0]
        exponent = torch.log2(ratio.double().abs()).round().masked_fill(empty, 0)
        factor = torch.exp2(exponent)
        error = (s - factor[:, None].to(b.dtype) * b).abs().amax(1).masked_fill(unclear, 0)
        if not bool(((error <= factor * bound) & (exponent >= 0) & (exponent < base)).all()):
            return None
        ids += exponent.long() * base**place
    return None if bool((ids >= count).any()) else ids.masked_fill(empty, NO_ROW).masked_fill(unclear, UNCLEAR)
