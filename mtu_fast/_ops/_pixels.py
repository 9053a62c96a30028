"""Patch Grams of convolutions by shifting pixel Grams, without unfolding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import Tensor

from mtu_fast._ops._blocks import WIDE

# how schemas of ops spell it
WALK = "int[] kernel, int[] stride, int[] padding, int[] dilation"


@dataclass(frozen=True)
class Walk:
    """Where a convolution's taps fall."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def patch_gram(
    x: Tensor, y: Tensor, grid_x: Sequence[int], grid_y: Sequence[int], walk: Walk
) -> Tensor:
    """Inner products of all patches of x `[R, F, C, *]` with all of y, `[R·F·positions, Q·F·positions]`."""
    n, m, d = x.shape[0] * x.shape[1], y.shape[0] * y.shape[1], len(grid_x)
    pixels = by_pixel(x).flatten(0, 1) @ by_pixel(y).flatten(0, 1).T
    pixels = pixels.view(n, *x.shape[3:], m, *y.shape[3:])
    out = pixels.new_zeros(n, *grid_x, m, *grid_y)
    # Patches overlap, so products of pixels are made once and read once a tap, at the same tap in
    # both patches.
    for delta in product(*(range(k) for k in walk.kernel)):
        here, there = zip(
            *(windows(delta, axis, x.shape[3 + axis], grid_x[axis], walk) for axis in range(d)),
            strict=True,
        )
        here_y, there_y = zip(
            *(windows(delta, axis, y.shape[3 + axis], grid_y[axis], walk) for axis in range(d)),
            strict=True,
        )
        full = slice(None)
        out[(full, *here, full, *here_y)] += pixels[(full, *there, full, *there_y)]
    return out.view(n * prod(grid_x), m * prod(grid_y))


def windows(
    delta: Sequence[int], axis: int, size: int, grid: int, walk: Walk
) -> tuple[slice, slice]:
    """Output positions whose tap at delta falls inside the image, and where it falls, along one axis."""
    stride, shift = walk.stride[axis], delta[axis] * walk.dilation[axis] - walk.padding[axis]
    first = max(0, -(shift // stride))  # the least p with p·stride + shift >= 0
    last = min(grid, (size - 1 - shift) // stride + 1)
    last = max(first, last)
    start = first * stride + shift
    return slice(first, last), slice(
        start, start + max(0, (last - first - 1) * stride + (last > first)), stride
    )


def by_pixel(t: Tensor) -> Tensor:
    """`[R, F, C, *]` -> float64 `[R, F·positions, C]`."""
    return t.flatten(3).to(WIDE).mT.flatten(1, 2)
