"""What several kernels are written with: dtypes in Triton's words, a choice among tensors, sums of parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LANGUAGE = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in FLOATS}


@triton.jit
def pick(values, which, COUNT: tl.constexpr):
    """`values[which]` of a tuple, `which` known at run time."""
    found = values[0]
    for i in tl.static_range(1, COUNT):
        found = tl.where(which == i, values[i], found)
    return found


@triton.jit
def number(value):
    """What `unspecialised` was given."""
    return (value - 3) >> 1


def unspecialised(values: Sequence[int]) -> tuple[int, ...]:
    """Numbers from 0 as odd ones from 3, for tuples.

    Triton compiles a kernel anew for each pattern of ones and multiples of 16 in a tuple, and does not look at
    `do_not_specialize` for what a tuple holds: every other number of rows would be compiled by itself.
    """
    return tuple([2 * value + 3 for value in values])


@triton.jit(do_not_specialize=["count", "splits"])
def _add_splits(parts, out, count, splits, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float64)
    for split in range(splits):
        total += tl.load(parts + at + split * count, mask=at < count, other=0.0)
    tl.store(out + at, total, mask=at < count)


def add_splits(parts: Tensor, out: Tensor) -> None:
    """`out` becomes the sum of `parts` `[splits, *out.shape]`, added in order."""
    count = out.numel()
    _add_splits[(triton.cdiv(count, 256),)](parts, out, count, len(parts), WIDTH=256)
