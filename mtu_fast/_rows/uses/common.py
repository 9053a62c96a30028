"""Penalties on parameters: directions that all rows have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from mtu_fast._ops._blocks import WIDE, working_dtype
from mtu_fast._ops.explicit import row_inner
from mtu_fast._rows.uses.base import Use


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
        # directions are of all rows
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
        # [R, K] @ [K, columns]
        return self.scale.to(self.dtype) @ self.flat[:, start:stop].to(self.dtype)

    def weighted(self, w: Tensor | None) -> Tensor:
        # In float64: these are few numbers, and may cancel, as where a method removes what rows
        # have in common.
        share = self.scale.to(WIDE).sum(0) if w is None else w.to(WIDE) @ self.scale.to(WIDE)
        dtype = self.dtype if w is None else torch.promote_types(self.dtype, w.dtype)
        return (share.to(dtype) @ self.flat.to(dtype)).view(self.shape)

    def inner(self, d: Tensor) -> Tensor:
        # ⟨S D, d⟩ = S ⟨D, d⟩: directions meet d once for all rows
        return self.scale.to(WIDE) @ row_inner(self.flat, d.flatten())
