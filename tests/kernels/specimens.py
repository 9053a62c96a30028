"""Launches of typical sizes, to be compiled: what the launchers would start on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from mtu_fast.kernels import explicit, gram, rank_one
from mtu_fast.kernels import rows as formed


def outer(
    dtype: torch.dtype, precision: str, s: int = 196, tasks: int = 1, samples: int = 8
) -> None:
    left = [torch.zeros(samples, s, 256, dtype=dtype)] * tasks
    gram.outer_ghost(left, [torch.zeros(samples, s, 512, dtype=dtype) for _ in left], precision)


def conv(dtype: torch.dtype, precision: str) -> None:
    x, b = torch.zeros(8, 1, 64, 8, 8, dtype=dtype), torch.zeros(8, 1, 128, 8, 8, dtype=dtype)
    gram.conv_ghost([x], [b], [3, 3], [1, 1], [1, 1], [1, 1], precision)


def gather() -> None:
    gram.gather_gram([torch.zeros(8, 64, dtype=torch.int64)], [torch.zeros(8, 64, 256)], "highest")


def rows(dtype: torch.dtype, *counts: int) -> Tensor:
    return explicit.row_gram([torch.zeros(count, 4096, dtype=dtype) for count in counts])


def sides(dtype: torch.dtype, count: int, *widths: int, tasks: int = 1) -> Tensor:
    """Layers of these widths one behind the other, and their biases; the tasks share activations."""
    left, right = list[Tensor](), list[Tensor]()
    for wide, next_wide in pairwise(widths):
        b = [torch.zeros(count, next_wide, dtype=dtype) for _ in range(tasks)]
        left += [torch.zeros(count, wide, dtype=dtype)] * tasks + b
        right += b + [torch.ones((), dtype=dtype).expand(count, 1)] * tasks
    return rank_one.rank_one_gram(left, right, len(left) // tasks)


GRAM: dict[str, Callable[[], object]] = {
    "row_gram, 16 rows": partial(rows, torch.float32, 16),
    "row_gram, 3 × 10 rows": partial(rows, torch.float32, 10, 10, 10),
    "row_gram, 3 × 8 rows": partial(rows, torch.float32, 8, 8, 8),
    "row_gram, 48 rows of bfloat16": partial(rows, torch.bfloat16, 48),
    "row_gram, 256 rows": partial(rows, torch.float32, 256),
    "rank_one_gram, 16 rows": partial(sides, torch.float32, 16, 768, 1024, 1024, 1024, 10),
    "rank_one_gram, 9 rows": partial(sides, torch.float32, 9, 768, 1024, 1024, 1024, 10),
    "rank_one_gram, 3 × 64 rows": partial(sides, torch.float32, 64, 1024, 1024, 1000, tasks=3),
    "rank_one_gram, 64 rows, a layer of bfloat16": partial(sides, torch.bfloat16, 64, 1024, 4096),
    "outer_ghost, float32 highest": partial(outer, torch.float32, "highest"),
    "outer_ghost, float32 high, 3 tasks": partial(outer, torch.float32, "high", tasks=3),
    "outer_ghost, 3 tasks of 6": partial(outer, torch.float32, "high", s=192, tasks=3, samples=6),
    "outer_ghost, float32 medium, short": partial(outer, torch.float32, "medium", s=4),
    "outer_ghost, bfloat16": partial(outer, torch.bfloat16, "highest"),
    "conv_ghost, float32 highest": partial(conv, torch.float32, "highest"),
    "conv_ghost, float32 high": partial(conv, torch.float32, "high"),
    "conv_ghost, bfloat16": partial(conv, torch.bfloat16, "medium"),
    "gather_gram, float32": gather,
}


def form(
    dtype: torch.dtype, precision: str = "highest", channels: int = 64, side: int = 56, taps: int = 3, tasks: int = 1,
    samples: int = 4, *, last: bool = False,
) -> None:  # fmt: skip
    """Rows of a convolution; last: output gradients with channels last."""
    outputs = channels if channels > 3 else 64
    x = torch.zeros(samples, 1, channels, side, side, dtype=dtype)
    b = [torch.zeros(samples, 1, outputs, side, side, dtype=dtype) for _ in range(tasks)]
    if last:
        b = [t.movedim(2, -1).contiguous().movedim(-1, 2) for t in b]
    walk = ([taps] * 2, [1, 1], [taps // 2] * 2, [1, 1])
    formed.unordered_rows([x] * tasks, b, *walk, precision)


def grouped(dtype: torch.dtype, groups: int) -> None:
    x = torch.zeros(4, 1, 64, 28, 28, dtype=dtype)
    formed.grouped_rows(x, x, groups, [3, 3], [1, 1], [1, 1], [1, 1])


def linear(precision: str) -> None:
    x, b = torch.zeros(4, 1, 196, 256).mT, torch.zeros(4, 1, 196, 512).mT
    formed.unordered_rows([x], [b], [1], [1], [0], [1], precision)


def _forms(dtype: torch.dtype, precision: str) -> dict[str, Callable[[], object]]:
    name = f"{str(dtype).removeprefix('torch.')} {precision}"
    made = partial(form, dtype, precision)
    return {
        f"64 x 56², {name}": made,
        f"512 x 16², channels last, {name}": partial(made, 512, 16, last=True),
        f"256 x 14², 3 tasks, {name}": partial(made, 256, 14, tasks=3),
        f"3 x 112², 7x7, {name}": partial(made, 3, 112, 7),
        f"16 x 32², one row, {name}": partial(made, 16, 32, samples=1),
    }


F32, F64, HALF = torch.float32, torch.float64, torch.bfloat16
ROWS: dict[str, Callable[[], object]] = {
    **_forms(F32, "highest"), **_forms(F32, "high"), **_forms(F32, "medium"), **_forms(HALF, "highest"),
    **_forms(F64, "highest"),
    **{f"{groups} groups, {dtype}": partial(grouped, dtype, groups) for groups in (1, 8, 64) for dtype in (F32, HALF)},
    **{f"linear, {precision}": partial(linear, precision) for precision in ("high", "medium")},
}  # fmt: skip
