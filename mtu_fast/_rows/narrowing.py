"""Directions in the dtypes of their parameters: rounded many at a time, since each conversion is a launch on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

WAITING = 1 << 26  # bytes that wait to be rounded: what a direction takes beyond its parameters


def narrowed(found: Iterable[tuple[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
    """{parameter: its part of a direction, in its dtype} of (parameter, part) one after the other."""
    rounded: dict[Tensor, Tensor] = {}
    wide: list[Tensor] = []
    narrow: list[Tensor] = []
    taken = 0
    for parameter, part in found:
        if part.dtype == parameter.dtype:
            rounded[parameter] = part
            continue
        rounded[parameter] = torch.empty_like(part, dtype=parameter.dtype)
        wide.append(part)
        narrow.append(rounded[parameter])
        taken += part.numel() * part.element_size()
        if taken > WAITING:
            torch._foreach_copy_(narrow, wide)
            wide, narrow, taken = [], [], 0
    if wide:
        torch._foreach_copy_(narrow, wide)
    return rounded
