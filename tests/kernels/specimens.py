"""Launches of typical sizes, to be compiled: what the launchers would start on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mtu_fast.kernels import gram


def outer(dtype: torch.dtype, precision: str, s: int = 196, tasks: int = 1) -> None:
    left = [torch.zeros(8, s, 256, dtype=dtype)] * tasks
    gram.outer_ghost(left, [torch.zeros(8, s, 512, dtype=dtype) for _ in left], precision)


def conv(dtype: torch.dtype, precision: str) -> None:
    x, b = torch.zeros(8, 1, 64, 8, 8, dtype=dtype), torch.zeros(8, 1, 128, 8, 8, dtype=dtype)
    gram.conv_ghost([x], [b], [3, 3], [1, 1], [1, 1], [1, 1], precision)


def gather() -> None:
    gram.gather_gram([torch.zeros(8, 64, dtype=torch.int64)], [torch.zeros(8, 64, 256)], "highest")


def rows(dtype: torch.dtype, *counts: int) -> Tensor:
    return gram.row_gram([torch.zeros(count, 4096, dtype=dtype) for count in counts])


GRAM: dict[str, Callable[[], object]] = {
    "row_gram, 16 rows": partial(rows, torch.float32, 16),
    "row_gram, 3 × 10 rows": partial(rows, torch.float32, 10, 10, 10),
    "row_gram, 48 rows of bfloat16": partial(rows, torch.bfloat16, 48),
    "row_gram, 256 rows": partial(rows, torch.float32, 256),
    "outer_ghost, float32 highest": partial(outer, torch.float32, "highest"),
    "outer_ghost, float32 high, 3 tasks": partial(outer, torch.float32, "high", tasks=3),
    "outer_ghost, float32 medium, short": partial(outer, torch.float32, "medium", s=4),
    "outer_ghost, bfloat16": partial(outer, torch.bfloat16, "highest"),
    "conv_ghost, float32 highest": partial(conv, torch.float32, "highest"),
    "conv_ghost, bfloat16": partial(conv, torch.bfloat16, "medium"),
    "gather_gram, float32": gather,
}
