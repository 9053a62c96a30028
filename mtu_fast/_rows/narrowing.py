"""Directions in the dtypes of their parameters: rounded many at a time, since each conversion is a launch on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

WAITING = 1 << 26  # bytes that wait to be rounded: what a direction takes beyond its parameters

# what a call takes together -> (rounded, as summed) each
Waiting = dict[object, list[tuple[Tensor, Tensor]]]


def narrowed(found: Iterable[tuple[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
    """{parameter: its part of a direction, in its dtype} of (parameter, part) one after the other."""
    rounded: dict[Tensor, Tensor] = {}
    waiting: Waiting = {}
    taken = 0
    for parameter, part in found:
        if part.dtype == parameter.dtype:
            rounded[parameter] = part
            continue
        narrow = rounded[parameter] = torch.empty_like(part, dtype=parameter.dtype)
        # Of one dtype each: of mixed ones torch makes a launch each, and older versions wrote wrong numbers.
        waiting.setdefault((narrow.dtype, part.dtype, part.device), []).append((narrow, part))
        taken += part.numel() * part.element_size()
        if taken > WAITING:
            _round(waiting)
            taken = 0
    _round(waiting)
    return rounded


def _round(waiting: Waiting) -> None:
    for several in waiting.values():
        torch._foreach_copy_([narrow for narrow, _ in several], [wide for _, wide in several])
    waiting.clear()
