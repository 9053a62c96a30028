"""From rows and a method to the update: weights, `Jᵀ w`, and its refinement where the Gram is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mtu_fast._ops.gram import inexact
from mtu_fast._rows.refine import Direction, Space, Squares, refined, sensitive
from mtu_fast._rows.shared import Shared
from mtu_fast.methods import Method, Roles
from mtu_fast.methods.base import Constraint, has_constraint


class Source(Space, Protocol):
    """Rows, as far as a method needs them; deferred: whether a look at a number waits for the device."""

    @property
    def roles(self) -> Roles: ...

    @property
    def deferred(self) -> bool: ...
    def gram(self, per: str = "total") -> Tensor: ...
    def wide_vjp(self, w: Tensor) -> Direction: ...


@dataclass(frozen=True)
class Solved:
    """What a method made of the rows.

    Attributes:
        weights: w `[R]`, or `[L, R]`.
        outside: weights `[R]` of the losses for parameters outside.
        gram: the Gram matrix that w was made from; None where none was needed.
        per: "total", "layer" or "tensor", the groups of the Gram.
        constraint: what must hold of `Jᵀ w` and is to be refined; None where nothing is.
        wide: sum `Jᵀ w` in float64, so that there is nothing to refine.
    """

    weights: Tensor
    outside: Tensor
    gram: Tensor | None = None
    per: str = "total"
    constraint: Constraint | None = None
    wide: bool = False

    def direction(
        self, rows: Source, shared: Shared, squares: Squares
    ) -> tuple[Direction, Tensor | None]:
        """`Jᵀ w`, and what is left of the constraint; None where that was not measured."""
        if self.wide:
            return rows.wide_vjp(self.weights), None
        if self.gram is None or self.constraint is None:
            return rows.vjp(self.weights), None
        places = shared.places(self.per)
        return refined(rows, self.weights, self.constraint, self.gram, places, self.per, squares)

    def unsure(self, d: Direction) -> Iterator[Tensor]:
        """What may be infinite in `Jᵀ w` although G and w, which are float64, are finite."""
        if self.gram is not None:
            lengths = self.gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
            # |d| at most; not finite where a weight is not
            yield (self.weights.abs() * lengths).sum(-1, dtype=_widest(d))
        else:
            yield self.weights
        sure = self.gram is not None and self.constraint is None
        yield from [g for g in d.values() if not sure or g.dtype.itemsize < 4]


def _widest(d: Direction) -> torch.dtype:
    return max({g.dtype for g in d.values()}, key=_largest, default=torch.float64)


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


def solve(rows: Source, method: Method | Tensor, shared: Shared, has_outside: bool) -> Solved:
    """w = method(G, roles), or the weights that are given."""
    if isinstance(method, Tensor):
        return Solved(method, method)
    gram, per = None, "total"
    if method.needs_gram:
        per = "total" if method.granularity == "global" else method.granularity
        gram = rows.gram(per)
    # counted by torch with every write in place
    version = _version(gram)
    weights = method(gram, rows.roles)
    if _version(gram) != version:
        raise RuntimeError(
            f"{type(method).__name__}: found that it wrote into G, expected that it only reads it: G says what was "
            "done, and is used again by a memory. Let it work on G.clone(); .grad is untouched."
        )
    outside = method.outside(rows.roles) if has_outside else weights
    solved = Solved(weights, outside, gram, per)
    return solved if gram is None else _refining(solved, gram, rows, method, shared)


def _version(gram: Tensor | None) -> int:
    """How often a Gram was written to; 0 in inference mode, where nobody counts."""
    return 0 if gram is None or gram.is_inference() else gram._version


def _refining(solved: Solved, gram: Tensor, rows: Source, method: Method, shared: Shared) -> Solved:
    """The same with what is done against rounding."""
    exact = not inexact(gram.device, rows.roles.dtype, shared.precision)
    # Jᵀ w is rounded where rows are narrower than the float64 of G and w
    narrow = rows.roles.dtype.itemsize < gram.dtype.itemsize
    if exact and not narrow:
        return solved
    if exact and rows.deferred:
        # A look at the condition would wait for the device, and cost more than wider sums.
        return replace(solved, wide=has_constraint(method))
    constraint = sensitive(method, gram, rows.roles, solved.weights, exact)
    return replace(solved, constraint=constraint)
