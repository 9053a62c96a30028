"""The kinds of use: what is known of the rows' gradients at one place where a parameter enters the graph.

A use stands for the matrix of row gradients `[R, P]` of one parameter without being it:

=======  ==========================================  =========================================
kind     holds                                       row gradient
=======  ==========================================  =========================================
Outer    left `[R, S, A]`, right `[R, S, B]`         `Σ_s left[r, s] ⊗ right[r, s]`, `[A, B]`
Conv     x `[R, F, C, *]`, b `[R, F, O, *]`          the convolution's weight gradient, `[O, C/g, *k]`
Gather   index `[R, S]`, values `[R, S, D]`          `Σ_s e_index[r, s] ⊗ values[r, s]`, `[V, *D]`
Common   scale `[R, K]`, direction `[K, *shape]`     `Σ_k scale[r, k] direction[k]`
Dense    rows `[R, *shape]`                          itself
Several  parts, uses of several of these kinds       the sum of theirs
Stacked   parts, uses of some blocks                  theirs beside one another, `[E, *block]`
=======  ==========================================  =========================================

Between a use and its parameter there may be a `Chain` of views and casts: linear maps whose
adjoints keep inner products. A Gram is therefore taken on this side of the chain, a combination is
pushed through it once, and a direction is pulled back to this side before the rows' inner products
with it are taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import lcm, prod

import torch
from torch import Tensor

from mtu_fast._ops._blocks import WIDE, working_dtype
from mtu_fast._ops._convolution import Geometry, conv_weight_gradient
from mtu_fast._ops.explicit import (
    conv_inner,
    conv_rows,
    gather_inner,
    gather_rows,
    outer_inner,
    outer_rows,
    row_inner,
)
from mtu_fast._ops.gram import conv_cost, outer_cost


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
        # a cast on the way rounds d; bfloat16 takes 8 of the 24 bits of a float32 at a time
        for _ in range(3):
            # and float16 has little range
            scale = torch.exp2(left.abs().max().clamp(min=TINY).log2().floor())
            (part,) = torch.autograd.grad(y, x, (left / scale).to(y.dtype), retain_graph=True)
            found += scale * part
            left = left - scale * self.apply(part)
        return found


DIRECT = Chain()
TINY = torch.finfo(WIDE).tiny


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
        """What this use keeps alive."""

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
        return self.with_tensors(*(t[rows] for t in self.tensors))  # where each is [R, …]

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype the rows have, or would have."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The rows on this side of the chain, `[R, prod(shape)]`."""

    @abstractmethod
    def weighted(self, w: Tensor | None) -> Tensor:
        """`Σ_r w_r row_r` on this side of the chain, `[*shape]`, in memory of its own; without w the plain sum."""

    @abstractmethod
    def inner(self, d: Tensor) -> Tensor:
        """`⟨row_r, d⟩` on this side of the chain, products and sums float64: d float64 `[*shape]` -> `[R]`."""

    def vjp(self, w: Tensor | None) -> Tensor:
        """`Σ_r w_r row_r` in the shape of the parameter; w `[R]`, or None for the plain sum."""
        return self.chain.apply(self.weighted(w))

    def jvp(self, d: Tensor) -> Tensor:
        """`J d`, the inner product of each row with d of the parameter's shape; float64 `[R]`."""
        return self.inner(self.chain.pull(d, self.shape))

    def dense(self) -> Dense:
        """The same rows, materialised; the chain stays."""
        return Dense(self.shape, self.matrix().view(self.count, *self.shape), chain=self.chain)

    def grounded(self) -> Dense:
        """The same rows, materialised in the space of the parameter itself."""
        rows = self.matrix().view(self.count, *self.shape)
        if self.chain != DIRECT:
            moved = [
                self.chain.apply(row)
                for row in (rows if self.count else rows.new_zeros(1, *self.shape))
            ]
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

    def rows_pay(self) -> bool:
        """Whether a Gram and a combination cost less where the rows are formed and kept for both."""
        return False


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
        (rows,) = tensors
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
            left, right = weigh(self.left, w), self.right.to(self.dtype)
        else:
            left, right = self.left.to(self.dtype), weigh(self.right, w)
        return (left.flatten(0, 1).T @ right.flatten(0, 1)).view(self.shape)

    def inner(self, d: Tensor) -> Tensor:
        return outer_inner(self.left, self.right, d.view(self.left.shape[2], self.right.shape[2]))

    def rows_pay(self) -> bool:
        return self.left.shape[1] > 1 and outer_cost([self.left], [self.right]).rows_pay

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
        x, b = self.x.to(self.dtype), weigh(self.b, w)
        return conv_weight_gradient(x.flatten(0, 1), b.flatten(0, 1), self.geometry)

    def inner(self, d: Tensor) -> Tensor:
        return conv_inner(self.x, self.b, self.geometry, d)

    def rows_pay(self) -> bool:
        return conv_cost([self.x], [self.b], self.geometry).rows_pay


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
        found = values.new_zeros(self.shape[0], self.unit).index_add_(
            0, self.index.flatten(), values.flatten(0, 1)
        )
        return found.view(self.shape)

    @property
    def unit(self) -> int:
        return self.values.shape[2]

    def columns(self, start: int, stop: int) -> Tensor:
        first, last = start // self.unit, stop // self.unit
        inside = (self.index >= first) & (self.index < last)
        index = (self.index - first).clamp(0, last - first - 1)
        return gather_rows(index, self.values * inside[..., None], last - first).flatten(1)

    def inner(self, d: Tensor) -> Tensor:
        return gather_inner(self.index, self.values, d.view(self.shape[0], self.unit))


@dataclass(frozen=True)
class Common(Use):
    """Rows along a few directions that all rows have in common, `Σ_k scale[r, k] direction[k]`.

    The gradient of what a loss says of parameters alone, a penalty: scale `[R, K]`, direction `[K,
    *shape]`.
    """

    scale: Tensor
    direction: Tensor

    @property
    def count(self) -> int:
        return self.scale.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.scale, self.direction)

    @property
    def flat(self) -> Tensor:
        """The directions, `[K, prod(shape)]`."""
        return self.direction.reshape(len(self.direction), prod(self.shape))

    def with_tensors(self, *tensors: Tensor) -> Common:
        scale, direction = tensors
        return replace(self, scale=scale, direction=direction)

    def select(self, rows: Tensor) -> Common:
        return replace(self, scale=self.scale[rows])

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.direction)

    def matrix(self) -> Tensor:
        return self.columns(0, prod(self.shape))

    @property
    def unit(self) -> int:
        return 1

    def columns(self, start: int, stop: int) -> Tensor:
        return self.scale.to(self.dtype) @ self.flat[:, start:stop].to(self.dtype)

    def weighted(self, w: Tensor | None) -> Tensor:
        # In float64: these are few numbers, and may cancel, as where a method removes what rows
        # have in common.
        share = self.scale.to(WIDE).sum(0) if w is None else w.to(WIDE) @ self.scale.to(WIDE)
        return (share.to(self.dtype) @ self.flat.to(self.dtype)).view(self.shape)

    def inner(self, d: Tensor) -> Tensor:
        return self.scale.to(WIDE) @ row_inner(self.flat, d.flatten())


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
        left = iter(tensors)
        return replace(
            self, parts=tuple(p.with_tensors(*(next(left) for _ in p.tensors)) for p in self.parts)
        )

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

    What `products.merge` makes of unequal kinds: a table that is looked up and multiplied with, a
    weight and a penalty.
    """

    def matrix(self) -> Tensor:
        return reduce(torch.add, (part.matrix() for part in self.parts))

    @property
    def unit(self) -> int:
        return lcm(*(part.unit for part in self.parts))

    def columns(self, start: int, stop: int) -> Tensor:
        return reduce(torch.add, (part.columns(start, stop) for part in self.parts))

    def weighted(self, w: Tensor | None) -> Tensor:
        return reduce(torch.add, (part.weighted(w) for part in self.parts))

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
        there = dict(zip(self.at, self.parts, strict=True))
        none = self.tensors[0].new_zeros(self.count, self.unit, dtype=self.dtype)
        wanted = range(start // self.unit, stop // self.unit)
        return torch.cat([there[e].matrix() if e in there else none for e in wanted], 1)

    def weighted(self, w: Tensor | None) -> Tensor:
        found = self.tensors[0].new_zeros(self.shape, dtype=self.dtype)
        for e, part in zip(self.at, self.parts, strict=True):
            found[e] = part.weighted(w)
        return found

    def inner(self, d: Tensor) -> Tensor:
        return reduce(
            torch.add, (part.inner(d[e]) for e, part in zip(self.at, self.parts, strict=True))
        )


def weigh(t: Tensor, w: Tensor | None, beside: Tensor | None = None) -> Tensor:
    """`w[r] t[r]` in the working dtype, in one pass over t; with what stands `beside` added to it."""
    dtype = working_dtype(t)
    t = t.to(dtype)
    if w is None:
        return t
    w = w.to(dtype).view(-1, *[1] * (t.dim() - 1))
    return t * w if beside is None else torch.addcmul(beside, t, w)
