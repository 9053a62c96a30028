"""The four kinds of use: what is known of the rows' gradients at one place where a parameter enters the graph.

A use stands for the matrix of row gradients `[R, P]` of one parameter without being it:

=======  ==========================================  =========================================
kind     holds                                       row gradient
=======  ==========================================  =========================================
Outer    left `[R, S, A]`, right `[R, S, B]`         `Σ_s left[r, s] ⊗ right[r, s]`, `[A, B]`
Conv     x `[R, F, C, *]`, b `[R, F, O, *]`          the convolution's weight gradient, `[O, C/g, *k]`
Gather   index `[R, S]`, values `[R, S, D]`          `Σ_s e_index[r, s] ⊗ values[r, s]`, `[V, D]`
Dense    rows `[R, *shape]`                          itself
=======  ==========================================  =========================================

Between a use and its parameter there may be a `Chain` of views and casts: linear maps whose adjoints keep inner
products. A Gram is therefore taken on this side of the chain, a combination is pushed through it once, and a direction
is pulled back to this side before the rows' inner products with it are taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import lcm, prod
from typing import TypeVar

import torch
from torch import Tensor

from mtu_fast.ops import gram as op
from mtu_fast.ops._blocks import WIDE, memory, same
from mtu_fast.ops.explicit import (
    Geometry,
    conv_inner,
    conv_rows,
    conv_weight_gradient,
    gather_inner,
    gather_rows,
    outer_inner,
    outer_rows,
    row_inner,
    working_dtype,
)


@dataclass(frozen=True)
class Chain:
    """The adjoint of the views and casts from a parameter to the op that uses it; equal keys mean equal maps."""

    key: tuple[object, ...] = ()
    apply: Callable[[Tensor], Tensor] = field(default=lambda g: g, compare=False, repr=False)

    def pull(self, d: Tensor, shape: Sequence[int]) -> Tensor:
        """`Aᵀ d` float64 `[*shape]` for the linear map A = `apply`: the gradient of `⟨A x, d⟩` by x."""
        if not self.key or not d.numel():
            return d.detach().to(WIDE).reshape(shape)
        found, left = d.new_zeros(shape, dtype=WIDE), d.detach().to(WIDE)
        x = torch.zeros_like(found, requires_grad=True)
        with torch.enable_grad():
            y = self.apply(x)
        for _ in range(3):  # a cast on the way rounds d; bfloat16 takes 8 of the 24 bits of a float32 at a time
            scale = torch.exp2(left.abs().max().clamp(min=TINY).log2().floor())  # and float16 has little range
            part, = torch.autograd.grad(y, x, (left / scale).to(y.dtype), retain_graph=True)
            found += scale * part
            left = left - scale * self.apply(part)
        return found


DIRECT = Chain()
SMALL = 1 << 14  # numbers of a row: below, calls cost more than the work, and parameters are taken together
TINY = torch.finfo(WIDE).tiny
U = TypeVar("U", bound="Use")


@dataclass(frozen=True)
class Use(ABC):
    """Row gradients of one parameter at one place of the graph."""

    shape: tuple[int, ...]
    chain: Chain = field(default=DIRECT, kw_only=True)

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of rows R."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What this use keeps alive, each `[R, …]`."""

    @abstractmethod
    def with_tensors(self, *tensors: Tensor) -> Use:
        """The same use with other tensors in the place of these."""

    @property
    def held(self) -> int:
        """Bytes that this use keeps alive."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def versions(self) -> tuple[int, ...]:
        """Changes whenever something that this use keeps alive is written to in place."""
        return tuple(t._version for t in self.tensors)

    def select(self, rows: Tensor) -> Use:
        """The use of some rows only; rows int64 `[R']`."""
        return self.with_tensors(*(t[rows] for t in self.tensors))

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype the rows have, or would have."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The rows on this side of the chain, `[R, prod(shape)]`."""

    @abstractmethod
    def weighted(self, w: Tensor | None) -> Tensor:
        """`Σ_r w_r row_r` on this side of the chain, `[*shape]`; without w the plain sum."""

    @abstractmethod
    def inner(self, d: Tensor) -> Tensor:
        """`⟨row_r, d⟩` on this side of the chain, products and sums float64: d float64 `[*shape]` -> `[R]`."""

    def combine(self, w: Tensor | None) -> Tensor:
        """`Σ_r w_r row_r` in the shape of the parameter; w `[R]`, or None for the plain sum."""
        return self.chain.apply(self.weighted(w))

    def push(self, d: Tensor) -> Tensor:
        """`J d`, the inner product of each row with d of the parameter's shape; float64 `[R]`."""
        return self.inner(self.chain.pull(d, self.shape))

    def dense(self) -> Dense:
        """The same rows, materialised; the chain stays."""
        return Dense(self.shape, self.matrix().view(self.count, *self.shape), chain=self.chain)

    def grounded(self) -> Dense:
        """The same rows, materialised in the space of the parameter itself."""
        rows = self.matrix().view(self.count, *self.shape)
        if self.chain != DIRECT:
            moved = [self.chain.apply(row) for row in (rows if self.count else rows.new_zeros(1, *self.shape))]
            rows = torch.stack(moved)[: self.count]  # without a row the shape is still to be found
        return Dense(tuple(rows.shape[1:]), rows)

    @property
    def unit(self) -> int:
        """Columns of `matrix` that are formed together."""
        return prod(self.shape)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns of `matrix`, `[R, stop - start]`; start and stop are multiples of `unit`."""
        return self.matrix()[:, start:stop]

    def rows_bytes(self) -> int:
        """Bytes that the rows take when materialised."""
        return self.count * prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Dense(Use):
    """Rows that are simply there: rows `[R, *shape]`."""

    rows: Tensor

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.rows,)

    def with_tensors(self, *tensors: Tensor) -> Dense:
        rows, = tensors
        return replace(self, rows=rows)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    def matrix(self) -> Tensor:
        return self.rows.reshape(self.count, prod(self.shape))

    @property
    def unit(self) -> int:
        return 1

    def weighted(self, w: Tensor | None) -> Tensor:
        dtype = working_dtype(self.rows)
        if w is None:
            return self.rows.to(dtype).sum(0)
        return (w.to(dtype) @ self.matrix().to(dtype)).view(self.shape)

    def inner(self, d: Tensor) -> Tensor:
        return row_inner(self.matrix(), d.flatten())


@dataclass(frozen=True)
class Outer(Use):
    """Rows `Σ_s left[r, s] ⊗ right[r, s]` of a matrix: left `[R, S, A]`, right `[R, S, B]`, prod(shape) = A·B."""

    left: Tensor
    right: Tensor

    @property
    def count(self) -> int:
        return self.left.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.left, self.right)

    def with_tensors(self, *tensors: Tensor) -> Outer:
        left, right = tensors
        return replace(self, left=left, right=right)

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.left)

    def matrix(self) -> Tensor:
        return outer_rows(self.left, self.right).flatten(1)

    @property
    def unit(self) -> int:
        return self.right.shape[2]

    def columns(self, start: int, stop: int) -> Tensor:
        left = self.left[:, :, start // self.unit : stop // self.unit]
        return outer_rows(left, self.right).flatten(1)

    def weighted(self, w: Tensor | None) -> Tensor:
        # The weights go to the smaller side; positions and rows are one contraction: a single GEMM.
        if self.left.shape[2] <= self.right.shape[2]:
            left, right = _scaled(self.left, w), self.right.to(self.dtype)
        else:
            left, right = self.left.to(self.dtype), _scaled(self.right, w)
        return (left.flatten(0, 1).T @ right.flatten(0, 1)).view(self.shape)

    def inner(self, d: Tensor) -> Tensor:
        return outer_inner(self.left, self.right, d.view(self.left.shape[2], self.right.shape[2]))

    def transposed(self) -> Outer:
        """The same rows as a use of the transposed matrix."""
        return replace(self, shape=self.shape[::-1], left=self.right, right=self.left)


@dataclass(frozen=True)
class Conv(Use):
    """Rows that are convolution weight gradients: x `[R, F, C, *]`, b `[R, F, O, *]`, F images a row."""

    x: Tensor
    b: Tensor
    geometry: Geometry

    @property
    def count(self) -> int:
        return self.x.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x, self.b)

    def with_tensors(self, *tensors: Tensor) -> Conv:
        x, b = tensors
        return replace(self, x=x, b=b)

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.x)

    def matrix(self) -> Tensor:
        return conv_rows(self.x, self.b, self.geometry).flatten(1)

    @property
    def unit(self) -> int:
        return prod(self.geometry.weight[1:]) if self.geometry.plain else prod(self.shape)

    def columns(self, start: int, stop: int) -> Tensor:
        if not self.geometry.plain:
            return self.matrix()
        first, last = start // self.unit, stop // self.unit
        part = replace(self.geometry, weight=(last - first, *self.geometry.weight[1:]))
        return conv_rows(self.x, self.b[:, :, first:last], part).flatten(1)

    def weighted(self, w: Tensor | None) -> Tensor:
        x, b = self.x.to(self.dtype), _scaled(self.b, w)
        return conv_weight_gradient(x.flatten(0, 1), b.flatten(0, 1), self.geometry)

    def inner(self, d: Tensor) -> Tensor:
        return conv_inner(self.x, self.b, self.geometry, d)


@dataclass(frozen=True)
class Gather(Use):
    """Rows of a table, scattered: index `[R, S]` into V, values `[R, S, D]`, shape (V, D)."""

    index: Tensor
    values: Tensor

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
        values = _scaled(self.values, w)
        return values.new_zeros(self.shape).index_add_(0, self.index.flatten(), values.flatten(0, 1))

    def inner(self, d: Tensor) -> Tensor:
        return gather_inner(self.index, self.values, d)


def combine(uses: Sequence[Use], weights: Sequence[Tensor]) -> Tensor:
    """`Σ_i Σ_r w_i[r] row_i[r]` over several uses of one parameter, in the parameter's shape.

    Uses that share an activation (one forward under several tasks) add up their weighted output gradients first: one
    weight gradient for all of them.
    """
    parts: list[tuple[Use, Tensor | None]] = []  # without weights where they are in the use already
    for use, w in zip(uses, weights, strict=True):
        for i, (other, of_other) in enumerate(parts):
            if (joined := _joined(use, w, other, of_other)) is not None:
                parts[i] = (joined, None)
                break
        else:
            parts.append((use, w))
    found = [use.combine(w) for use, w in parts]
    return sum(found[1:], found[0])


def _joined(u: Use, w: Tensor, v: Use, of_v: Tensor | None) -> Use | None:
    """One use whose unweighted sum is that of two weighted ones with the same activation; None if they have not."""
    if u.chain != v.chain or u.shape != v.shape:
        return None
    if isinstance(u, Outer) and isinstance(v, Outer):
        if same(u.left, v.left):
            return replace(u, right=_scaled(u.right, w, _scaled(v.right, of_v)))
        if same(u.right, v.right):
            return replace(u, left=_scaled(u.left, w, _scaled(v.left, of_v)))
    if isinstance(u, Conv) and isinstance(v, Conv) and u.geometry == v.geometry and same(u.x, v.x):
        return replace(u, b=_scaled(u.b, w, _scaled(v.b, of_v)))
    return None


def _scaled(t: Tensor, w: Tensor | None, beside: Tensor | None = None) -> Tensor:
    """`w[r] t[r]` in the working dtype, in one pass over t; with what stands `beside` added to it."""
    dtype = working_dtype(t)
    t = t.to(dtype)
    if w is None:
        return t
    w = w.to(dtype).view(-1, *[1] * (t.dim() - 1))
    return t * w if beside is None else torch.addcmul(beside, t, w)


def merge(uses: Sequence[Use]) -> Use:
    """One use for the sum of several uses of one parameter by the same rows."""
    first = uses[0]
    if len(uses) == 1:
        return first
    if aligned(uses):
        if outers := _only(Outer, uses):
            left, right = ([getattr(u, side) for u in outers] for side in ("left", "right"))
            return Outer(first.shape, torch.cat(left, 1), torch.cat(right, 1), chain=first.chain)
        if gathers := _only(Gather, uses):
            index, values = (torch.cat([getattr(u, side) for u in gathers], 1) for side in ("index", "values"))
            return Gather(first.shape, index, values, chain=first.chain)
        rows = torch.stack([u.matrix() for u in uses]).sum(0)
        return Dense(first.shape, rows.view(first.count, *first.shape), chain=first.chain)
    rows = torch.stack([u.grounded().rows for u in uses]).sum(0)
    return Dense(tuple(rows.shape[1:]), rows)


def aligned(uses: Sequence[Use]) -> bool:
    """Whether the uses share one chain and shape, so that they meet on this side of it."""
    return all(u.chain == uses[0].chain and u.shape == uses[0].shape for u in uses)


def gram(uses: Sequence[Use], precision: str = "highest") -> Tensor:
    """`G = J Jᵀ` of one parameter over the rows of several uses, float64 `[ΣR, ΣR]`; `precision` as in `ops.gram`.

    Uses of one kind, shape and chain go to their op together; unequal ones meet as explicit rows.
    """
    if not aligned(uses):
        return op.row_gram([u.grounded().matrix() for u in uses])
    if outers := _only(Outer, uses):
        return op.outer_gram([u.left for u in outers], [u.right for u in outers], precision)
    if convs := _only(Conv, uses):
        return op.conv_gram([u.x for u in convs], [u.b for u in convs], convs[0].geometry, precision)
    if gathers := _only(Gather, uses):
        return op.gather_gram([u.index for u in gathers], [u.values for u in gathers], precision)
    return _mixed_gram(uses)


def rank_one(uses: Sequence[Use]) -> list[Outer]:
    """The uses if their rows are outer products of one position in one space, else nothing."""
    outers = _only(Outer, uses) if aligned(uses) else []
    return outers if all(u.left.shape[1] == 1 for u in outers) else []


def rank_one_gram(
    parameters: Sequence[Sequence[Outer]], beside: Sequence[list[Use]]
) -> tuple[Tensor, list[list[Use]]]:
    """The sum of `gram` over parameters with uses of rank one by the same rows: one call for all of them.

    Parameters of explicit rows `beside` them that are a side of the outer products (a bias) join as products with 1,
    the products of that side being known; the others are handed back.
    """
    pairs = [([u.left[:, 0] for u in uses], [u.right[:, 0] for u in uses]) for uses in parameters]
    one = pairs[0][0][0].new_ones(())
    of_side = {tuple(map(memory, side)): at for at, pair in enumerate(pairs) for side in pair}
    biases: dict[int, list[tuple[list[Tensor], list[Tensor]]]] = {}
    others = []
    for uses in beside:
        rows = [use.matrix() for use in uses]
        at = of_side.get(tuple(map(memory, rows)))
        if at is None:
            others.append(uses)
        else:
            biases.setdefault(at, []).append((rows, [one.expand(len(t), 1) for t in rows]))
    # A bias right behind its weight: the products of their side need not be held for long.
    order = [each for at, pair in enumerate(pairs) for each in (pair, *biases.get(at, ()))]
    left, right = (list(chain.from_iterable(sides)) for sides in zip(*order, strict=True))
    return op.rank_one_gram(left, right, len(order)), others


def small(uses: Sequence[Use]) -> bool:
    """Whether the uses are few explicit numbers a row in one space: taken together with others (`side_by_side`)."""
    return bool(_only(Dense, uses)) and prod(uses[0].shape) <= SMALL and aligned(uses)


def side_by_side(parameters: Sequence[Sequence[Use]]) -> Iterator[list[Tensor]]:
    """The rows of small uses of parameters by the same rows, joined to `[R_i, ΣP]` per block, some at a time."""
    some: list[list[Tensor]] = []
    taken = 0
    for uses in parameters:
        rows = [use.matrix() for use in uses]
        taken += sum(t.numel() for t in rows)
        if some and taken > op.BUFFER:
            yield [torch.cat(block, 1) for block in zip(*some, strict=True)]
            some, taken = [], sum(t.numel() for t in rows)
        some.append(rows)
    if some:
        yield [torch.cat(block, 1) for block in zip(*some, strict=True)]


def _mixed_gram(uses: Sequence[Use]) -> Tensor:
    """`gram` of aligned uses of several kinds, a tile of explicit rows at a time."""
    R, width, unit = sum(u.count for u in uses), prod(uses[0].shape), lcm(*(u.unit for u in uses))
    step = max(op.BUFFER // max(R * unit, 1), 1) * unit
    found = uses[0].tensors[-1].new_zeros(R, R, dtype=WIDE)
    for start in range(0, width, max(step, 1)):
        found += op.row_gram([u.columns(start, min(start + step, width)) for u in uses])
    return found


def route(uses: Sequence[Use]) -> str:
    """The route that `gram` takes for these uses, in words."""
    if aligned(uses):
        if outers := _only(Outer, uses):
            return "outer, " + op.outer_route([u.left for u in outers], [u.right for u in outers])
        if convs := _only(Conv, uses):
            return "conv, " + op.conv_route([u.x for u in convs], [u.b for u in convs], convs[0].geometry)
        if _only(Gather, uses):
            return "entries that occur"
    return "explicit rows"


def rows_pay(use: Use) -> bool:
    """Whether a Gram and a combination of a use cost less where its rows are formed and kept for both."""
    if isinstance(use, Outer):
        return use.left.shape[1] > 1 and op.outer_cost([use.left], [use.right]).rows_pay
    return isinstance(use, Conv) and op.conv_cost([use.x], [use.b], use.geometry).rows_pay


def _only(kind: type[U], uses: Sequence[Use]) -> list[U]:
    """The uses if all are of this kind (convolutions: of one geometry), else nothing."""
    found = [u for u in uses if isinstance(u, kind)]
    walks = {getattr(u, "geometry", None) for u in found}
    return found if len(found) == len(uses) and len(walks) == 1 else []

