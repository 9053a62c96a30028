"""The length of rows by few signed sums of their entries: an estimate that needs neither rows nor their Gram."""

from __future__ import annotations

import torch
from torch import Tensor

from mtu_fast._ops._blocks import WIDE

SKETCH = 8  # signed sums that a row's length is measured by


def signs(count: int, like: Tensor) -> Tensor:
    """Random signs `[count, SKETCH]`: `‖A signs‖² / SKETCH` is on average `‖A‖²`."""
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randint(2, (count, SKETCH), generator=generator)
    return (2 * drawn - 1).to(like)


def sketched(sums: Tensor) -> Tensor:
    """The length of each row from its signed sums `[R, SKETCH, …]`, float64 `[R]`."""
    return norms(sums.flatten(1)) / SKETCH**0.5


def norms(t: Tensor) -> Tensor:
    """The length of each last dimension, float64."""
    return torch.linalg.vector_norm(t, dim=-1, dtype=WIDE)


def ranged(t: Tensor) -> Tensor:
    """As it is, but for float16: sums leave its range."""
    return t.float() if t.dtype == torch.float16 else t
