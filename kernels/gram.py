"""`G = J Jᵀ` on GPUs by products of positions, for linear layers, convolutions and look-ups.

README.md derives the identity, the tiles, the floors and the errors. A call is deterministic:
programs write partial sums of their own, a second pass adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtu_fast.kernels.blocks import (
    PART,
    Family,
    channels_last,
    distinct,
    families,
    identity,
    operands,
    three,
)
from mtu_fast.kernels.device import arch, on
from mtu_fast.kernels.plans import WIDE, Plan, ghost_plan
from mtu_fast.kernels.shared import FLOATS, LANGUAGE, number, pick, unspecialised


@triton.jit
def _products(
    total, x_at, y_at, x_step, y_step, x_live, y_live, depth,
    DEPTH: tl.constexpr, OPERAND: tl.constexpr, SUMS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """`total + X Yᵀ`, X and Y tiles of positions given by the address of their first feature."""
    for k in range(0, depth, DEPTH):
        c = k + tl.arange(0, DEPTH)
        wide, inside = c.to(tl.int64)[None, :], (c < depth)[None, :]
        x = tl.load(x_at[:, None] + wide * x_step, mask=x_live[:, None] & inside, other=0.0).to(
            OPERAND
        )
        y = tl.load(y_at[:, None] + wide * y_step, mask=y_live[:, None] & inside, other=0.0).to(
            OPERAND
        )
        total = tl.dot(x, tl.trans(y), total, input_precision=MODE, out_dtype=SUMS)
    return total


@triton.jit
def _corner(position, grid, walk):
    """The image of a position, and where the first tap of its window falls: f, z, y, x."""
    area = grid[1] * grid[2]
    f = position // (grid[0] * area)
    inner = position - f * (grid[0] * area)
    z, plane = inner // area, inner % area
    return (
        f,
        z * walk[3] - walk[6],
        plane // grid[2] * walk[4] - walk[7],
        plane % grid[2] * walk[5] - walk[8],
    )


@triton.jit
def _tap(corner, tap, size, strides, walk):
    """Offsets of the pixels under one tap of every window, and whether they lie in the image."""
    area = walk[1] * walk[2]
    z = corner[1] + tap // area * walk[9]
    y = corner[2] + tap % area // walk[2] * walk[10]
    x = corner[3] + tap % walk[2] * walk[11]
    depth, height, width = number(size[0]), number(size[1]), number(size[2])
    inside = (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return corner[0] * strides[1] + z * strides[2] + y * strides[3] + x * strides[4], inside


@triton.jit(do_not_specialize=["x_size", "y_size", "x_grid", "y_grid", "walk", "y_tiles"])
def _ghost(
    x_left, y_left, x_left_strides, y_left_strides, x_right, y_right, x_right_strides, y_right_strides,
    x_size, y_size, x_grid, y_grid, walk, left_depth, right_depth, y_tiles, out,
    KIND: tl.constexpr, SAME: tl.constexpr, X_TASKS: tl.constexpr, Y_TASKS: tl.constexpr, X_ROWS: tl.constexpr,
    Y_ROWS: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, OPERAND: tl.constexpr,
    SUMS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One tile of position pairs; `x_size`: rows, positions, padded positions (then the image's three extents)."""
    x_rows, x_positions, x_padded = number(x_size[0]), number(x_size[1]), number(x_size[2])
    y_rows, y_positions, y_padded = number(y_size[0]), number(y_size[1]), number(y_size[2])
    program = tl.program_id(0).to(tl.int64)
    i, j = program // y_tiles, program % y_tiles
    if (not SAME) | (i <= j):
        m, n = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
        r, q = m // x_padded, n // y_padded
        s, u = m % x_padded, n % y_padded
        m_live, n_live = (r < x_rows) & (s < x_positions), (q < y_rows) & (u < y_positions)
        pairs = X_TASKS * Y_TASKS
        if KIND == "gather":
            x_at = x_left + r * x_left_strides[0] + s * x_left_strides[1]
            y_at = y_left + q * y_left_strides[0] + u * y_left_strides[1]
            entry, other = tl.load(x_at, mask=m_live, other=0), tl.load(y_at, mask=n_live, other=0)
            shared = (entry[:, None] == other[None, :]) & m_live[:, None] & n_live[None, :]
            # no index in common: all products would be masked
            pairs = tl.where(tl.sum(tl.sum(shared.to(tl.int32), 1), 0) > 0, pairs, 0)
        else:
            shared = tl.zeros([TILE, TILE], SUMS)
            x_at, y_at = x_left + r * x_left_strides[0], y_left + q * y_left_strides[0]
            if KIND == "conv":
                x_corner, y_corner = _corner(s, x_grid, walk), _corner(u, y_grid, walk)
                for tap in range(walk[0] * walk[1] * walk[2]):
                    x_offset, x_inside = _tap(x_corner, tap, x_size[3:], x_left_strides, walk)
                    y_offset, y_inside = _tap(y_corner, tap, y_size[3:], y_left_strides, walk)
                    shared = _products(
                        shared, x_at + x_offset, y_at + y_offset, x_left_strides[5], y_left_strides[5],
                        m_live & x_inside, n_live & y_inside, left_depth, DEPTH, OPERAND, SUMS, MODE,
                    )  # fmt: skip
            else:
                shared = _products(
                    shared, x_at + s * x_left_strides[1], y_at + u * y_left_strides[1], x_left_strides[2],
                    y_left_strides[2], m_live, n_live, left_depth, DEPTH, OPERAND, SUMS, MODE,
                )  # fmt: skip

        # Parts of PART positions belong to one row each; which of the tile's rows that is.
        PARTS: tl.constexpr = TILE // PART
        part = tl.arange(0, PARTS) * PART
        x_row = (i * TILE + part) // x_padded - i * TILE // x_padded
        y_row = (j * TILE + part) // y_padded - j * TILE // y_padded
        x_mine = tl.arange(0, X_ROWS)[:, None] == x_row[None, :]  # [X_ROWS, PARTS]
        y_mine = tl.arange(0, Y_ROWS)[:, None] == y_row[None, :]
        x_offset = r * x_right_strides[0] + s * x_right_strides[1]
        y_offset = q * y_right_strides[0] + u * y_right_strides[1]
        tiles = tl.num_programs(0).to(tl.int64)
        at = tl.arange(0, X_ROWS)[:, None] * Y_ROWS + tl.arange(0, Y_ROWS)[None, :]
        for pair in range(pairs):
            x_task = pick(x_right, pair // Y_TASKS, X_TASKS) + x_offset
            y_task = pick(y_right, pair % Y_TASKS, Y_TASKS) + y_offset
            tile = _products(
                tl.zeros([TILE, TILE], SUMS), x_task, y_task, x_right_strides[2], y_right_strides[2], m_live, n_live,
                right_depth, DEPTH, OPERAND, SUMS, MODE,
            )  # fmt: skip
            if KIND == "gather":
                tile = tl.where(shared, tile, 0.0)
            else:
                tile = tile * shared
            # PART² products in the dtype of the sums, all further ones in float64
            parts = tl.sum(tl.sum(tl.reshape(tile, [PARTS, PART, PARTS, PART]), 3), 1).to(
                tl.float64
            )
            # [X_ROWS, PARTS]
            rows = tl.sum(tl.where(x_mine[:, :, None], parts[None, :, :], 0.0), 1)
            # [X_ROWS, Y_ROWS]
            rows = tl.sum(tl.where(y_mine[None, :, :], rows[:, None, :], 0.0), 2)
            tl.store(out + (pair * tiles + program) * (X_ROWS * Y_ROWS) + at, rows)


@triton.jit(
    do_not_specialize=["x_starts", "y_starts", "rows", "x_size", "y_size", "x_tiles", "y_tiles"]
)
def _collect(
    parts, gram, x_starts, y_starts, rows, x_size, y_size, x_tiles, y_tiles,
    SAME: tl.constexpr, X_TASKS: tl.constexpr, Y_TASKS: tl.constexpr, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds a row pair's tiles in order and writes the sum and its mirror image."""
    x_padded, y_rows, y_padded = number(x_size[2]), number(y_size[0]), number(y_size[2])
    r, pair = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q = tl.program_id(2).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    x_task, y_task = pair // Y_TASKS, pair % Y_TASKS
    mirrored = y_task * Y_TASKS + x_task
    live = q < y_rows
    if SAME:
        live = live & (r * X_TASKS + x_task <= q * Y_TASKS + y_task)  # each unordered pair once
    total = tl.zeros([WIDTH], tl.float64)
    # one after another and without atomics: the same bits every time
    for i in range(r * x_padded // TILE, ((r + 1) * x_padded - 1) // TILE + 1):
        for step in range((y_padded - 1) // TILE + 2):
            j = q * y_padded // TILE + step
            inside = live & (j * TILE < (q + 1) * y_padded)
            x, y = r - i * TILE // x_padded, q - j * TILE // y_padded
            at = ((pair * x_tiles + i) * y_tiles + j) * (X_ROWS * Y_ROWS) + x * Y_ROWS + y
            if SAME:  # tiles below the diagonal are those above, of the tasks exchanged
                below = (
                    ((mirrored * x_tiles + j) * y_tiles + i) * (X_ROWS * Y_ROWS) + y * Y_ROWS + x
                )
                at = tl.where(i <= j, at, below)
            total += tl.load(parts + at, mask=inside, other=0.0)
    x = number(pick(x_starts, x_task, X_TASKS)) + r
    y = number(pick(y_starts, y_task, Y_TASKS)) + q
    tl.store(gram + x * rows + y, total, mask=live)
    tl.store(gram + y * rows + x, total, mask=live)


def outer_ghost(left: Sequence[Tensor], right: Sequence[Tensor], precision: str) -> Tensor:
    """Products of positions; those of the side that more blocks share are made once."""
    if distinct(right) < distinct(left):
        left, right = right, left
    return _ghosts("outer", left, right, [(1, 1, 1)] * len(left), (1,) * 12, precision)


def conv_ghost(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str,
) -> Tensor:  # fmt: skip
    """Products of positions, windows read in place; what is not channels-last is copied so once."""
    if len(kernel) > 3:
        return NotImplemented
    walk = (*three(kernel, 1), *three(stride, 1), *three(padding, 0), *three(dilation, 1))
    copies: dict[tuple[object, ...], Tensor] = {}
    for t in x:
        if identity(t) not in copies:
            copies[identity(t)] = channels_last(t)
    left = [copies[identity(t)] for t in x]
    right = [channels_last(t).flatten(1, 4) for t in b]
    return _ghosts("conv", left, right, [three(t.shape[3:], 1) for t in b], walk, precision)


def gather_gram(
    index: Sequence[Tensor], values: Sequence[Tensor], precision: str = "highest"
) -> Tensor:
    """Products of positions where indices agree."""
    if any(t.dtype not in (torch.int64, torch.int32) for t in index):
        return NotImplemented
    return _ghosts("gather", index, values, [(1, 1, 1)] * len(index), (1,) * 12, precision)


def _ghosts(
    kind: str, left: Sequence[Tensor], right: Sequence[Tensor], grids: Sequence[tuple[int, ...]],
    walk: tuple[int, ...], precision: str,
) -> Tensor:  # fmt: skip
    """All pairs of families, a launch each."""
    dtypes = {t.dtype for t in (*right, *(() if kind == "gather" else left))}
    if not dtypes.issubset(FLOATS):
        return NotImplemented
    gram = right[0].new_zeros(sum(len(t) for t in right), sum(len(t) for t in right), dtype=WIDE)
    with on(gram):
        plan = ghost_plan(reduce(torch.promote_types, dtypes), precision, arch())
        if plan is None:
            return NotImplemented
        sides = operands(left, plan) if kind != "gather" else left, operands(right, plan)
        groups = list(families(*sides, grids))
        for f, one in enumerate(groups):
            for other in groups[f:]:
                _pair(kind, one, other, walk, plan, gram)
    return gram


def _pair(
    kind: str, one: Family, other: Family, walk: tuple[int, ...], plan: Plan, gram: Tensor
) -> None:
    """The blocks of G that two families meet in."""
    x_tiles, y_tiles = one.tiles(plan.tile), other.tiles(plan.tile)
    tasks, rows = (
        (len(one.right), len(other.right)),
        (one.rows_of_tile(plan.tile), other.rows_of_tile(plan.tile)),
    )
    # A look-up skips tiles where no index meets its like: they stay zero.
    make = gram.new_zeros if kind == "gather" else gram.new_empty
    parts = make(prod(tasks) * x_tiles * y_tiles * prod(rows))
    shape: dict[str, Any] = {
        "SAME": one is other, "X_TASKS": tasks[0], "Y_TASKS": tasks[1], "X_ROWS": rows[0], "Y_ROWS": rows[1],
        "TILE": plan.tile,
    }  # fmt: skip
    _ghost[(x_tiles * y_tiles,)](
        one.left, other.left, one.left.stride(), other.left.stride(), tuple(one.right), tuple(other.right),
        one.right[0].stride(), other.right[0].stride(), unspecialised(one.size), unspecialised(other.size), one.grid,
        other.grid, walk,
        one.left.shape[-1], one.right[0].shape[2], y_tiles, parts, KIND=kind, PART=PART, DEPTH=plan.depth,
        OPERAND=LANGUAGE[plan.operand], SUMS=LANGUAGE[plan.sums], MODE=plan.mode, num_warps=plan.warps,
        num_stages=plan.stages, **shape,
    )  # fmt: skip
    width = min(64, triton.next_power_of_2(other.size[0]))
    _collect[(one.size[0], prod(tasks), triton.cdiv(other.size[0], width))](
        parts, gram, unspecialised(one.starts), unspecialised(other.starts), len(gram), unspecialised(one.size[:3]),
        unspecialised(other.size[:3]), x_tiles, y_tiles,
        WIDTH=width, **shape,
    )  # fmt: skip
