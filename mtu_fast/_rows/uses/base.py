"""What every kind of use can do, the kind that is plain rows, and the chain between a use and its parameter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from mtu_fast._ops._blocks import WIDE, cast, working_dtype
from mtu_fast._ops._tiles import buffer
from mtu_fast._ops.explicit import row_inner, rows_sum

TINY = torch.finfo(WIDE).tiny


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
        # A is linear: the gradient of ⟨A x, d⟩ is Aᵀ d at any x, and 0 is one
        x = torch.zeros_like(found, requires_grad=True)
        with torch.enable_grad():
            y = self.apply(x)
        # a cast on the way rounds d; bfloat16 takes 8 of the 24 bits of a float32 at a time
        for _ in range(3):
            # and float16 has little range
            scale = torch.exp2(left.abs().max().clamp(min=TINY).log2().floor())
            (part,) = torch.autograd.grad(y, x, (left / scale).to(y.dtype), retain_graph=True)
            found += scale * part
            # what rounding kept back of d, for the next time
            left = left - scale * self.apply(part)
        return found


DIRECT = Chain()


@dataclass(frozen=True)
class Use:
    """Row gradients of one parameter at one place of the graph; an abstract class.

    Not an `ABC`: of those, asking an instance for its kind takes as long as an op.
    """

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

    def to(self, dtype: torch.dtype) -> Use:
        """The same with its numbers in another dtype."""
        return self.with_tensors(
            *(t.to(dtype) if t.is_floating_point() else t for t in self.tensors)
        )

    @property
    def held(self) -> int:
        """Bytes that this use keeps alive."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def versions(self) -> tuple[int, ...]:
        """Changes whenever something that this use keeps alive is written to in place."""
        return tuple([t._version for t in self.tensors])

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
        # A is linear: applied to the sum, once
        return self.chain.apply(self.weighted(w))

    def jvp(self, d: Tensor) -> Tensor:
        """`J d`, the inner product of each row with d of the parameter's shape; float64 `[R]`."""
        # ⟨A row, d⟩ = ⟨row, Aᵀ d⟩
        return self.inner(self.chain.pull(d, self.shape))

    def dense(self) -> Dense:
        """The same rows, materialised; the chain stays."""
        rows = self.matrix().view(self.count, *self.shape)
        return Dense(self.shape, rows, chain=self.chain)

    def grounded(self) -> Dense:
        """The same rows, materialised in the space of the parameter itself."""
        rows = self.matrix().view(self.count, *self.shape)
        if self.chain != DIRECT:
            # Without a row the shape is still to be found: that of a row of zeros.
            some = rows if self.count else rows.new_zeros(1, *self.shape)
            rows = torch.stack([self.chain.apply(row) for row in some])[: self.count]
        return Dense(tuple(rows.shape[1:]), rows)

    @property
    def unit(self) -> int:
        """Columns of `matrix` that are formed together."""
        return prod(self.shape)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns of `matrix`, `[R, stop - start]`; start and stop are multiples of `unit`."""
        return self.matrix()[:, start:stop]

    def add_columns(self, found: Tensor, start: int, stop: int) -> None:
        """Add `columns(start, stop)` to `found`, contiguous `[R, stop - start]`."""
        found += self.columns(start, stop)

    def rows_bytes(self) -> int:
        """Bytes that the rows take when materialised."""
        return self.count * prod(self.shape) * self.dtype.itemsize

    def _columns_at_a_time(self) -> int:
        # whole units: columns that are formed together
        most = buffer(self.tensors[0].device) // max(self.count * self.unit, 1)
        return max(most, 1) * self.unit

    def lengths(self) -> Tensor:
        """About how long each row is, float64 `[R]`, by no Gram: what weights of a check are chosen by."""
        step = self._columns_at_a_time()
        squares = self.tensors[0].new_zeros(self.count, dtype=WIDE)
        for start in range(0, prod(self.shape), step):
            part = self.columns(start, min(start + step, prod(self.shape)))
            squares += part.to(WIDE).square().sum(1)
        return squares.sqrt()

    def alive(self) -> Tensor:
        """Which rows are not zero, bool `[R]`; a tile of them at a time."""
        step = self._columns_at_a_time()
        found = torch.zeros(self.count, dtype=torch.bool, device=self.tensors[0].device)
        for start in range(0, prod(self.shape), step):
            part = self.columns(start, min(start + step, prod(self.shape)))
            found |= (part != 0).any(1)
        return found

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
        return (
            self.rows if self.rows.dim() == 2 else self.rows.reshape(self.count, prod(self.shape))
        )

    @property
    def unit(self) -> int:
        return 1

    def weighted(self, w: Tensor | None) -> Tensor:
        dtype = working_dtype(self.rows)
        if w is None:
            return self.rows.to(dtype).sum(0)
        if w.dtype != dtype:
            dtype = torch.promote_types(dtype, w.dtype)
        w = cast(w, dtype)
        if dtype == self.rows.dtype:
            # [R] @ [R, P]
            return (w @ self.matrix()).view(self.shape)
        # rows narrower than w: widened a tile at a time
        return rows_sum(self.matrix(), w).view(self.shape)

    def inner(self, d: Tensor) -> Tensor:
        return row_inner(self.matrix(), d.flatten())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors keep alive; memory that several of them share counts once."""
    storages = {}
    for t in tensors:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def weigh(t: Tensor, w: Tensor | None, beside: Tensor | None = None) -> Tensor:
    """`w[r] t[r]` in the working dtype, or that of w if it is wider; with what stands `beside` added to it."""
    dtype = working_dtype(t)
    if w is None:
        return cast(t, dtype)
    if w.dtype != dtype:
        dtype = torch.promote_types(dtype, w.dtype)
    # [R, 1, …, 1]; a narrower t is widened within the product
    w = cast(w, dtype).view(-1, *[1] * (t.dim() - 1))
    return t * w if beside is None else torch.addcmul(beside, t, w)
