"""In which order a row meets the others, for methods that change rows one by one."""

from __future__ import annotations

import torch
from torch import Tensor


def visiting_orders(R: int, generator: torch.Generator | None) -> Tensor:
    """Row i holds the j ≠ i in the order in which i meets them, [R, R-1] int64; increasing without a generator."""
    device = torch.device("cpu") if generator is None else generator.device
    rows = torch.arange(R, device=device)[:, None]
    steps = torch.arange(max(R - 1, 0), device=device)
    # 0 … R - 2, with a gap where the row itself would be
    others = steps + (steps >= rows).long()
    if generator is None:
        return others
    # sorted random numbers are a random order for every row at once
    keys = torch.rand(others.shape, generator=generator, device=device, dtype=torch.float64)
    return others.gather(1, keys.argsort(1))
