"""Grams of positions in float64 without rounding, and blocks to compare by.

Small integers multiply and add without rounding in any order, so most comparisons are for equality.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtu_fast._ops import _library

built = pytest.mark.skipif(_library.EXTENSION is None, reason=_library.MISSING or "built")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Blocks = list[Tensor]


def named(ops: list[Any]) -> list[Any]:
    both = [(op.name, op) for op in ops] + [(f"{op.name}, reference", op.reference) for op in ops]
    return [pytest.param(function, id=name) for name, function in both]


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-3, 4, shape).to(dtype)


def outer_exact(left: Blocks, right: Blocks) -> Tensor:
    J = torch.cat([
        torch.bmm(a.double().mT, b.double()).flatten(1) for a, b in zip(left, right, strict=True)
    ])
    return J @ J.T


def walk(
    kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1, axes: int = 2
) -> tuple[Any, ...]:
    return [kernel] * axes, [stride] * axes, [padding] * axes, [dilation] * axes, "highest"


def unfolded(x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Patches of `[R, F, C, H, W]`: `[R, F·positions, C·taps]`."""
    kernel, stride, padding, dilation, _ = arguments
    patches = F.unfold(
        x.double().flatten(0, 1), kernel, dilation=dilation, padding=padding, stride=stride
    )
    return patches.mT.reshape(x.shape[0], x.shape[1] * patches.shape[2], patches.shape[1])


def conv_exact(x: Blocks, b: Blocks, arguments: tuple[Any, ...]) -> Tensor:
    return outer_exact(
        [unfolded(t, arguments) for t in x], [t.double().flatten(3).mT.flatten(1, 2) for t in b]
    )


def images(
    rows: int,
    frames: int,
    channels: int,
    size: tuple[int, int],
    out: int,
    arguments: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    x = integers(rows, frames, channels, *size)
    kernel, stride, padding, dilation, _ = arguments
    grid = [(n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)]  # fmt: skip
    return x, integers(rows, frames, out, *grid)
