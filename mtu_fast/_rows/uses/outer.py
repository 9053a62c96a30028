"""Linear layers: sums over positions of outer products of two sides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtu_fast._ops._blocks import cast, working_dtype
from mtu_fast._ops.explicit import outer_inner, outer_rows
from mtu_fast._ops.gram import outer_cost
from mtu_fast._rows.uses.base import Use, weigh
from mtu_fast._rows.uses.sketch import norms, ranged, signs, sketched


def positions_first(left: Tensor, right: Tensor) -> bool:
    """Whether positions of two sides `[R, S, width]` lie in memory before rows: sequence-first layers."""
    if left.shape[1] == 1:
        return False
    return left.stride(0) < left.stride(1) and right.stride(0) < right.stride(1)


def flattened(side: Tensor, first: bool) -> Tensor:
    """A side `[R, S, width]` as `[R·S, width]`, or `[S·R, width]` where positions come `first`."""
    return (side.transpose(0, 1) if first else side).flatten(0, 1)


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
        # a unit is a row of the matrix `[A, B]`: B columns
        left = self.left[:, :, start // self.unit : stop // self.unit]
        return outer_rows(left, self.right).flatten(1)

    def add_columns(self, found: Tensor, start: int, stop: int) -> None:
        left = self.left[:, :, start // self.unit : stop // self.unit].to(found.dtype)
        right = self.right.to(found.dtype)
        # [R, A', B] += [R, A', S] @ [R, S, B]
        found.view(self.count, left.shape[2], self.unit).baddbmm_(left.mT, right)

    def weighted(self, w: Tensor | None) -> Tensor:
        # positions and rows are one contraction: a single GEMM, [A, R·S] @ [R·S, B]
        left, right = self.weighted_sides(w)
        found = left.T @ right
        return found if found.shape == self.shape else found.view(self.shape)

    def weighted_sides(self, w: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[R·S, A]` and `[R·S, B]` with the weights in the smaller side, both in one dtype and one order."""
        if self.left.shape[2] <= self.right.shape[2]:
            left = weigh(self.left, w)
            right = cast(self.right, left.dtype)
        else:
            right = weigh(self.right, w)
            left = cast(self.left, right.dtype)
        first = positions_first(left, right)
        return flattened(left, first), flattened(right, first)

    def inner(self, d: Tensor) -> Tensor:
        return outer_inner(self.left, self.right, d.view(self.left.shape[2], self.right.shape[2]))

    def lengths(self) -> Tensor:
        """`‖left_r‖ ‖right_r‖` of one position; of several the length of some signed sums of the row's entries."""
        if self.left.shape[1] == 1:
            # ‖a ⊗ b‖ = ‖a‖ ‖b‖
            return (norms(self.left) * norms(self.right)).squeeze(1)
        # signs go to the wider side, which leaves the smaller product
        few, many = self.left, self.right
        if few.shape[2] > many.shape[2]:
            few, many = many, few
        sums = ranged(many) @ signs(many.shape[2], ranged(many))  # [R, S, SKETCH]
        return sketched(sums.to(self.dtype).mT @ few.to(self.dtype))

    def rows_pay(self) -> bool:
        return self.left.shape[1] > 1 and outer_cost([self.left], [self.right]).rows_pay

    def transposed(self) -> Outer:
        """The same rows as a use of the transposed matrix."""
        return Outer(self.shape[::-1], self.right, self.left, chain=self.chain)
