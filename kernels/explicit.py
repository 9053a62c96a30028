"""`G = J Jᵀ` on GPUs of explicit rows.

README.md has floors and errors. A call is deterministic: programs write partial sums of their own,
a second pass adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mtu_fast.kernels.blocks import alike, first_rows, operands
from mtu_fast.kernels.device import arch, multiprocessors, on
from mtu_fast.kernels.plans import WIDE, row_plan
from mtu_fast.kernels.shared import FLOATS, LANGUAGE, add_splits, number, unspecialised

# programs and warps that a multiprocessor is given, at least: it holds so many, or half, at a time,
# so that none of them runs alone at the end
WAVES, WARPS = 4, 8


@triton.jit
def tile_gram(
    x_at, y_at, x_live, y_live, begin, end, width, step,
    TILE: tl.constexpr, DEPTH: tl.constexpr, OPERAND: tl.constexpr, EXACT: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """`X Yᵀ` of two tiles of rows, given by the address of their first column, over columns begin to end of `width`."""
    total = tl.zeros([TILE, TILE], tl.float64)
    for k in range(begin, end, DEPTH):
        p = k + tl.arange(0, DEPTH).to(tl.int64)
        live = (p < width)[None, :]
        x = tl.load(x_at[:, None] + p[None, :] * step, mask=live & x_live[:, None], other=0.0)
        x = x.to(OPERAND)
        if ONE_TILE:
            y = x
        else:
            y = tl.load(y_at[:, None] + p[None, :] * step, mask=live & y_live[:, None], other=0.0)
            y = y.to(OPERAND)
        if EXACT:
            total = tl.dot(x, tl.trans(y), total, out_dtype=tl.float64)
        else:  # a short block in float32, the sum of blocks in float64
            total += tl.dot(x, tl.trans(y), input_precision="ieee").to(tl.float64)
    return total


@triton.jit
def store_tile(at, total, row, column, rows):
    """A tile on or above the diagonal, and its mirror image."""
    inside = (row < rows)[:, None] & (column < rows)[None, :]
    upper = inside & (row[:, None] <= column[None, :])
    tl.store(at + row[:, None] * rows + column[None, :], total, mask=upper)
    lower = inside & (row[:, None] < column[None, :])
    tl.store(at + column[None, :] * rows + row[:, None], total, mask=lower)


@triton.jit
def _row_pointers(blocks, starts, strides, row, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """The first element of each row, rows counted through all blocks."""
    # addresses are chosen among the blocks, which then need not be copied together
    at = blocks[0] + row * strides[0]
    for b in tl.static_range(1, COUNT):
        start = number(starts[b])
        at = tl.where(row >= start, blocks[b] + (row - start) * strides[b], at)
    if ALIGNED:
        at = tl.multiple_of(at, 16)  # bytes: what a load takes at most, and is lost in the choice
    return at


@triton.jit(do_not_specialize=["rows", "steps"])
def _row_gram(
    blocks, starts, strides, step, out, rows, width, steps,
    COUNT: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, OPERAND: tl.constexpr, EXACT: tl.constexpr,
    ONE_TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # 64 bits: products of row numbers and strides leave 32
    split, i, j = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1).to(tl.int64),
        tl.program_id(2).to(tl.int64),
    )
    if i <= j:  # tiles on and above the diagonal; each is written with its mirror image
        row, column = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
        x_at = _row_pointers(blocks, starts, strides, row, COUNT, ALIGNED)
        y_at = _row_pointers(blocks, starts, strides, column, COUNT, ALIGNED)
        begin = split * steps * DEPTH
        end = tl.minimum(begin + steps * DEPTH, width)
        total = tile_gram(
            x_at, y_at, row < rows, column < rows, begin, end, width, step, TILE, DEPTH, OPERAND, EXACT, ONE_TILE
        )  # fmt: skip
        store_tile(out + split * rows * rows, total, row, column, rows)


def row_gram(rows: Sequence[Tensor], known: int = 0) -> Tensor:
    """Tiles of G by splits of the width; one pass over the rows where they fit one tile."""
    counts, width = [t.shape[0] for t in rows], rows[0].shape[1]
    if any(t.dtype not in FLOATS or t.dim() != 2 or t.shape[1] != width for t in rows):
        return NotImplemented
    total = sum(counts)
    if not total or not width:
        return rows[0].new_zeros(total, total, dtype=WIDE)
    blocks = alike([t for t in rows if len(t)], 1)
    with on(blocks[0]):
        plan = row_plan(blocks[0].dtype, total, arch())
        if plan is None:
            return NotImplemented
        blocks = list(operands(blocks, plan))
        tiles = triton.cdiv(total, plan.tile)
        # so many splits of the width that every multiprocessor has work
        each = max(WAVES, WARPS // plan.warps)
        programs = max(1, each * multiprocessors(blocks[0]) // (tiles * (tiles + 1) // 2))
        steps = triton.cdiv(triton.cdiv(width, programs), plan.depth)
        splits = triton.cdiv(width, steps * plan.depth)
        # tiles of known rows are not launched, and would be added as memory was left
        empty = blocks[0].new_zeros if known else blocks[0].new_empty
        parts = empty(splits, total, total, dtype=WIDE)
        fresh = triton.cdiv(total - known, plan.tile)  # tiles of rows that are not all known
        _row_gram[(splits, max(1, fresh), tiles)](
            tuple(blocks), unspecialised(first_rows(blocks)), tuple(t.stride(0) for t in blocks), blocks[0].stride(1),
            parts, total, width, steps,
            COUNT=len(blocks), TILE=plan.tile, DEPTH=plan.depth, OPERAND=LANGUAGE[plan.operand],
            EXACT=plan.sums == WIDE, ONE_TILE=tiles == 1, ALIGNED=all(map(aligned, blocks)), num_warps=plan.warps,
            num_stages=plan.stages,
        )  # fmt: skip
        gram = blocks[0].new_empty(total, total, dtype=WIDE)
        add_splits(parts, gram)
        gram[total - known :, total - known :] = 0.0  # tiles on the border know some
    return gram


def aligned(block: Tensor) -> bool:
    """Whether every row begins where a load of 16 bytes may."""
    return not (block.data_ptr() % 16 or block.stride(0) * block.element_size() % 16)
