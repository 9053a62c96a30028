"""Rows of convolutions and linear layers by an implicit product of matrices: patches are read in place.

README.md counts the work, and says why rows are written and not multiplied where they are formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtu_fast.kernels.blocks import Family, channels_last, families, identity, operands, three
from mtu_fast.kernels.device import arch, multiprocessors, on
from mtu_fast.kernels.plans import WIDE, Plan, form_plan
from mtu_fast.kernels.shared import FLOATS, LANGUAGE, add_splits, pick

WAVES = 2  # programs that a multiprocessor is to have, or positions are split
LEAST = 8  # steps of a split
MOST = 1 << 30  # positions and columns of a row, which are counted in 32 bits


@triton.jit
def _places(p, grid, walk, ONE_IMAGE: tl.constexpr, AXES: tl.constexpr):
    """Of position p: its image, its place in it, and the corner z, y, x of its window."""
    image, inner = tl.zeros_like(p), p
    if not ONE_IMAGE:
        area = grid[0] * grid[1] * grid[2]
        image, inner = p // area, p % area
    z, y, x = tl.zeros_like(p), tl.zeros_like(p), inner
    if AXES >= 2:
        y, x = inner // grid[2], inner % grid[2]
    if AXES == 3:
        z, y = y // grid[1], y % grid[1]
    return image, inner, z * walk[3] - walk[6], y * walk[4] - walk[7], x * walk[5] - walk[8]


@triton.jit
def _offset(z, y, x, strides):
    """Of a pixel within an image."""
    return z * strides[2] + y * strides[3] + x * strides[4]


@triton.jit(do_not_specialize=["of_block", "size", "grid", "walk", "steps", "tiles"])
def _form(
    x, b, out, x_strides, b_strides, out_strides, of_block, channels, outputs, end, size, grid, walk, steps, tiles,
    TASKS: tl.constexpr, ONE_IMAGE: tl.constexpr, AXES: tl.constexpr, PADDED: tl.constexpr, DOWN: tl.constexpr,
    ACROSS: tl.constexpr, DEPTH: tl.constexpr, OPERAND: tl.constexpr, SUMS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """A tile, [outputs, (tap, channel)], of one row's weight, summed over a split of the positions."""
    program = tl.program_id(0).to(tl.int64)
    row, split = program // tiles, tl.program_id(1)
    task, r = row // of_block, row % of_block
    tile = (program % tiles).to(tl.int32)
    width = walk[0] * walk[1] * walk[2] * channels
    across, down = tl.cdiv(width, ACROSS), tl.cdiv(outputs, DOWN)
    k = tile % across * ACROSS + tl.arange(0, ACROSS)
    o = tile // across % down * DOWN + tl.arange(0, DOWN)
    group = (tile // (across * down)).to(tl.int64)
    tap, c = k // channels, k % channels
    below = tap // walk[2]
    # where the tap lies from the corner of a window
    dz, dy, dx = below // walk[1] * walk[9], below % walk[1] * walk[10], tap % walk[2] * walk[11]
    # 64 bits to a row and its group, 32 within
    x_at = x + r * x_strides[0] + group * channels * x_strides[5]
    b_at = pick(b, task, TASKS) + r * b_strides[0] + group * outputs * b_strides[2]
    x_k, b_o = c * x_strides[5] + _offset(dz, dy, dx, x_strides), o * b_strides[2]

    total = tl.zeros([DOWN, ACROSS], SUMS)
    begin = split * steps * DEPTH
    for start in range(begin, tl.minimum(begin + steps * DEPTH, end), DEPTH):
        p = start + tl.arange(0, DEPTH)
        image, inner, cz, cy, cx = _places(p, grid, walk, ONE_IMAGE, AXES)
        x_p = image * x_strides[1] + _offset(cz, cy, cx, x_strides)
        inside = (p < end)[:, None] & (k < width)[None, :]
        if PADDED:
            z, y, w = (
                cz[:, None] + dz[None, :],
                cy[:, None] + dy[None, :],
                cx[:, None] + dx[None, :],
            )
            inside &= (z >= 0) & (z < size[0]) & (y >= 0) & (y < size[1]) & (w >= 0) & (w < size[2])
        seen = tl.load(x_at + (x_p[:, None] + x_k[None, :]), mask=inside, other=0.0).to(OPERAND)
        b_p = image * b_strides[1] + inner * b_strides[3]
        live = (o < outputs)[:, None] & (p < end)[None, :]
        met = tl.load(b_at + (b_o[:, None] + b_p[None, :]), mask=live, other=0.0).to(OPERAND)
        total = tl.dot(met, seen, total, input_precision=MODE, out_dtype=SUMS)

    to = pick(out, task, TASKS) + split.to(tl.int64) * out_strides[0] + r * out_strides[1]
    at = (group * outputs + o)[:, None] * out_strides[2] + (
        c * out_strides[3] + tap * out_strides[4]
    )[None, :]
    tl.store(to + at, total, mask=(o < outputs)[:, None] & (k < width)[None, :])


def unordered_rows(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str,
) -> list[Tensor]:  # fmt: skip
    """Rows of all blocks, one launch for those that share their images; columns by (output, tap, channel)."""
    walk = _walk(kernel, stride, padding, dilation)
    linear = prod(kernel) == 1 and not any(padding)
    found = _formed(x, b, walk, 1, precision, weights=False, linear=linear)
    return NotImplemented if found is NotImplemented else [t.flatten(1) for t in found]


def grouped_rows(
    x: Tensor, b: Tensor, groups: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Rows in the order of a weight, all groups in one launch."""
    walk = _walk(kernel, stride, padding, dilation)
    found = _formed([x], [b], walk, groups, "highest", weights=True, linear=False)
    return (
        NotImplemented if found is NotImplemented else found[0].view(*found[0].shape[:3], *kernel)
    )


def _walk(*parts: Sequence[int]) -> tuple[int, ...]:
    """Kernel, stride, padding and dilation along z, y, x; () where there are more axes."""
    if len(parts[0]) > 3:
        return ()
    return sum((three(part, rest) for part, rest in zip(parts, (1, 1, 0, 1), strict=True)), ())


def _formed(
    x: Sequence[Tensor], b: Sequence[Tensor], walk: tuple[int, ...], groups: int, precision: str, *, weights: bool,
    linear: bool,
) -> list[Tensor]:  # fmt: skip
    """Rows of blocks x `[R_i, F, C, *]`, b `[R_i, F, O, *]`.

    Returns:
        `[R_i, O, C / groups, taps]` each if `weights`, else `[R_i, O, taps, C / groups]`.
    """
    dtypes = {t.dtype for t in (*x, *b)}
    if not walk or not dtypes.issubset(FLOATS):
        return NotImplemented
    with on(b[0]):
        plan = form_plan(reduce(torch.promote_types, dtypes), precision, arch(), linear)
        grids = [three(t.shape[3:], 1) for t in b]
        if plan is None or not all(
            _countable(*pair, walk) for pair in zip(x, b, grids, strict=True)
        ):
            return NotImplemented
        left = operands(_once(x, lambda t: _near(channels_last(t))), plan)
        right = operands(_once(b, lambda t: _near(t.flatten(3))), plan)
        sizes = left[0].shape[-1] // groups, prod(walk[:3])
        shape = (b[0].shape[2], *(sizes if weights else sizes[::-1]))
        out = [_room(x_i, b_i, shape) for x_i, b_i in zip(x, b, strict=True)]
        for family in families(left, right, grids):
            _launch(family, [out[i] for i in family.members], walk, groups, plan, weights)
    return out


def _countable(x: Tensor, b: Tensor, grid: tuple[int, ...], walk: tuple[int, ...]) -> bool:
    """Whether 32 bits count what lies in a row, and how far the kernel walks."""
    columns = x.shape[2] * b.shape[2] * prod(walk[:3])
    reach = [n * s + k * d for n, k, s, d in zip(grid, walk[:3], walk[3:6], walk[9:], strict=True)]
    sizes = (prod(x.shape[1:]), prod(b.shape[1:]), columns, *reach)
    return max(sizes) < MOST


def _once(blocks: Sequence[Tensor], lay_out: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The blocks laid out, those that are one and the same once."""
    known: dict[tuple[object, ...], Tensor] = {}
    for t in blocks:
        if identity(t) not in known:
            known[identity(t)] = lay_out(t)
    return [known[identity(t)] for t in blocks]


def _near(t: Tensor) -> Tensor:
    """The tensor, copied where elements of a row lie too far apart for 32 bits."""
    span = sum((n - 1) * step for n, step in zip(t.shape[1:], t.stride()[1:], strict=True))
    return t if span < MOST else t.contiguous()


def _room(x: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where a block's rows go; zeros where there is nothing to sum."""
    make = x.new_empty if x.numel() and b.numel() else x.new_zeros
    return make(len(x), *shape, dtype=WIDE if WIDE in (x.dtype, b.dtype) else torch.float32)


def _axes(grid: tuple[int, ...]) -> int:
    """The last axes of z, y, x that tell positions apart."""
    return next((3 - axis for axis, n in enumerate(grid) if n > 1), 1)


def _launch(
    family: Family, out: list[Tensor], walk: tuple[int, ...], groups: int, plan: Plan, weights: bool
) -> None:
    """The rows of one family, by splits of the positions where there are few tiles."""
    x, b = family.left, family.right
    images, outputs = b[0].shape[1], b[0].shape[2] // groups
    channels = x.shape[-1] // groups
    width = channels * prod(walk[:3])
    tile = plan.tile if min(outputs, width) >= plan.tile else min(plan.tile, 64)
    down, across = (min(tile, max(16, triton.next_power_of_2(n))) for n in (outputs, width))
    tiles = groups * triton.cdiv(outputs, down) * triton.cdiv(width, across)
    end, programs = images * prod(family.grid), tiles * len(x) * len(b)
    splits = min(
        triton.cdiv(WAVES * multiprocessors(x), programs), triton.cdiv(end, LEAST * plan.depth)
    )
    steps = triton.cdiv(triton.cdiv(end, splits), plan.depth)
    splits = triton.cdiv(end, steps * plan.depth)
    to = out if splits == 1 else [t.new_empty(splits, *t.shape, dtype=plan.sums) for t in out]
    strides = to[0].stride() if splits > 1 else (0, *to[0].stride())
    _form[(programs, splits)](
        x, tuple(b), tuple(to), x.stride(), b[0].stride(), strides if weights else (*strides[:3], *strides[:2:-1]),
        len(x), channels, outputs, end, x.shape[2:5], family.grid, walk, steps, tiles,
        TASKS=len(b), ONE_IMAGE=images == 1, AXES=_axes(family.grid), PADDED=any(walk[6:9]), DOWN=down,
        ACROSS=across, DEPTH=plan.depth, OPERAND=LANGUAGE[plan.operand], SUMS=LANGUAGE[plan.sums], MODE=plan.mode,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if splits > 1:
        for parts, rows in zip(to, out, strict=True):
            add_splits(parts, rows)
