"""`g - Qᵀ(Q g)` or `Qᵀ(Q g)` over a list of parameters: two launches, each of which reads Q once.

A program walks a run of columns of one parameter; where these lie it looks up in a table. The first
launch leaves float64 coefficients, one set a run, which are summed in a fixed order; the second
reads Q again, last columns first, since these may still be in the cache. Products and sums are
float64 on the vector units: for one g that is one multiply-add an element of Q.

Parameters whose rows are dense and aligned are read 16 bytes at a time, the others element by
element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtu_fast.kernels.convert import narrow, widen
from mtu_fast.kernels.device import on

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
MAX_K = 512
WARPS = 4
LOOPS = 16  # blocks of columns in a run, at most
RUNS = 4096  # a run is shorter where there would be fewer: every multiprocessor gets several

# The table's columns, all int64; strides count elements.
G, G_ROW, G_COLUMN, Q, Q_ROW, Q_COLUMN, OUT, SIZE, FIRST_RUN, ALIGNED, FIELDS = map(
    tl.constexpr, range(11)
)
# elements under way, over rows of Q, of g and a piece, that a thread of the first pass has
# registers for
SUMS = 128
# rows of Q under way at once in the second pass; fewer where every element has an address of its
# own
UNROLL = 8
UNSPECIALIZED = ("runs_before", "span", "K", "M")


@triton.jit
def _address(entry, field: tl.constexpr, element: tl.constexpr, aligned: tl.constexpr):
    """A base pointer from the table."""
    base = tl.load(entry + field).to(tl.pointer_type(element))
    return tl.multiple_of(base, 16) if aligned else base


@triton.jit
def _number(entry, field: tl.constexpr, piece: tl.constexpr, aligned: tl.constexpr):
    """A row stride or a size from the table."""
    number = tl.load(entry + field)
    return tl.multiple_of(number, piece) if aligned else number


@triton.jit
def _spread(threads: tl.constexpr, piece: tl.constexpr, aligned: tl.constexpr):
    """A block's columns such that a thread holds all of the piece axis and sums over it without exchange."""
    thread, element = tl.arange(0, threads), tl.arange(0, piece)
    return (
        thread[:, None] * piece + element[None, :]
        if aligned
        else element[:, None] * threads + thread[None, :]
    )


@triton.jit
def _sum_run(
    entry, run, span, partial, k_first, m_first, K, M, g_type: tl.constexpr, Q_type: tl.constexpr,
    k_tile: tl.constexpr, m_tile: tl.constexpr, piece: tl.constexpr, block: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """One run's part of `Q g`, for a tile of K and of M."""
    g, q = _address(entry, G, g_type, aligned), _address(entry, Q, Q_type, aligned)
    g_row, q_row = _number(entry, G_ROW, piece, aligned), _number(entry, Q_ROW, piece, aligned)
    g_column, q_column = tl.load(entry + G_COLUMN), tl.load(entry + Q_COLUMN)
    size = _number(entry, SIZE, piece, aligned)
    start = tl.multiple_of((run - tl.load(entry + FIRST_RUN)) * span, block)
    threads: tl.constexpr = block // piece
    sums = ()
    for _ in tl.static_range(k_tile * m_tile):
        sums += (tl.zeros([threads], tl.float64),)
    for first in range(start, tl.minimum(start + span, size), block):
        columns = first + _spread(threads, piece, aligned)
        at_g, at_q = (columns, columns) if aligned else (columns * g_column, columns * q_column)
        vectors = ()
        for m in tl.static_range(m_tile):
            # rows beyond the last read the last one, and are not stored
            row = tl.minimum(m_first + m, M - 1) * g_row
            vectors += (widen(tl.load(g + row + at_g, mask=columns < size, other=0.0)),)
        summed = ()
        for k in tl.static_range(k_tile):
            inside = columns < tl.where(k_first + k < K, size, 0)
            row = widen(tl.load(q + (k_first + k) * q_row + at_q, mask=inside, other=0.0))
            for m in tl.static_range(m_tile):
                summed += (
                    sums[k * m_tile + m] + tl.sum(row * vectors[m], axis=1 if aligned else 0),
                )
        sums = summed
    for k in tl.static_range(k_tile):
        for m in tl.static_range(m_tile):
            if (k_first + k < K) & (m_first + m < M):
                tl.store(
                    partial + (run * K + k_first + k) * M + m_first + m,
                    tl.sum(sums[k * m_tile + m]),
                )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _coefficients(
    table, owners, partial, runs_before, span, K, M, g_type: tl.constexpr, Q_type: tl.constexpr,
    k_tile: tl.constexpr, m_tile: tl.constexpr, piece: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Each run's part of `Q g`, float64 [runs, K, M]; the tiles of one run are neighbours and find g in the cache."""
    program, k_tiles, m_tiles = (
        tl.program_id(0).to(tl.int64),
        tl.cdiv(K, k_tile),
        tl.cdiv(M, m_tile),
    )
    run, tile = runs_before + program // (k_tiles * m_tiles), program % (k_tiles * m_tiles)
    k_first, m_first = tile % k_tiles * k_tile, tile // k_tiles * m_tile
    entry = table + tl.load(owners + run) * FIELDS
    if tl.load(entry + ALIGNED) != 0:
        _sum_run(
            entry, run, span, partial, k_first, m_first, K, M, g_type, Q_type, k_tile, m_tile, piece, block, True
        )  # fmt: skip
    else:  # an address for each element, so a row of Q at a time
        for k in range(k_tile):
            _sum_run(
                entry, run, span, partial, k_first + k, m_first, K, M, g_type, Q_type, 1, m_tile, piece, block, False
            )  # fmt: skip


@triton.jit
def _write_run(
    entry, run, span, c, m_first, K, M, into: tl.constexpr, g_type: tl.constexpr, Q_type: tl.constexpr,
    k_tile: tl.constexpr, m_tile: tl.constexpr, piece: tl.constexpr, block: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """One run's columns of the result, for a tile of M."""
    g, q = _address(entry, G, g_type, aligned), _address(entry, Q, Q_type, aligned)
    out = _address(entry, OUT, g_type, aligned)
    g_row, q_row = _number(entry, G_ROW, piece, aligned), _number(entry, Q_ROW, piece, aligned)
    g_column, q_column = tl.load(entry + G_COLUMN), tl.load(entry + Q_COLUMN)
    size = _number(entry, SIZE, piece, aligned)
    start = tl.multiple_of((run - tl.load(entry + FIRST_RUN)) * span, block)
    for first in range(start, tl.minimum(start + span, size), block):
        columns = first + _spread(block // piece, piece, aligned)
        at_g, at_q = (columns, columns) if aligned else (columns * g_column, columns * q_column)
        sums = ()
        for _ in tl.static_range(m_tile):
            sums += (tl.zeros(columns.shape, tl.float64),)
        for k_first in range(0, K, k_tile):
            for k in tl.static_range(k_tile):
                there = k_first + k < K
                inside = columns < tl.where(there, size, 0)
                row = widen(tl.load(q + (k_first + k) * q_row + at_q, mask=inside, other=0.0))
                summed = ()
                for m in tl.static_range(m_tile):
                    weight = tl.load(
                        c + (k_first + k) * M + tl.minimum(m_first + m, M - 1),
                        mask=there,
                        other=0.0,
                    )
                    summed += (sums[m] + row * weight,)
                sums = summed
        for m in tl.static_range(m_tile):
            inside = columns < tl.where(m_first + m < M, size, 0)
            result = sums[m]
            if not into:
                result = (
                    widen(tl.load(g + (m_first + m) * g_row + at_g, mask=inside, other=0.0))
                    - result
                )
            tl.store(out + (m_first + m) * size + columns, narrow(result, g_type), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _result(
    table, owners, c, runs_before, span, K, M, into: tl.constexpr, g_type: tl.constexpr, Q_type: tl.constexpr,
    k_tile: tl.constexpr, m_tile: tl.constexpr, piece: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`Qᵀ c` or `g - Qᵀ c` from coefficients c [K, M]."""
    # from the end: what the first pass has read last is in the cache
    program, m_tiles = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64), tl.cdiv(M, m_tile)
    run, m_first = runs_before + program // m_tiles, program % m_tiles * m_tile
    entry = table + tl.load(owners + run) * FIELDS
    if tl.load(entry + ALIGNED) != 0:
        _write_run(
            entry,
            run,
            span,
            c,
            m_first,
            K,
            M,
            into,
            g_type,
            Q_type,
            k_tile,
            m_tile,
            piece,
            block,
            True,
        )
    else:
        _write_run(
            entry, run, span, c, m_first, K, M, into, g_type, Q_type, 2, m_tile, piece, block, False
        )


@dataclass(frozen=True)
class _Group:
    """The runs of all parameters of one pair of dtypes."""

    dtypes: tuple[torch.dtype, torch.dtype]  # of g and of Q
    runs_before: int
    runs: int
    span: int  # columns of a run

    @property
    def piece(self) -> int:
        """Elements of Q in 16 bytes."""
        return 16 // self.dtypes[1].itemsize

    def constants(self, k_tile: int, m_tile: int) -> dict[str, Any]:
        """What the kernels are compiled for."""
        types = {"g_type": TYPES[self.dtypes[0]], "Q_type": TYPES[self.dtypes[1]]}
        tiles = {
            "k_tile": k_tile,
            "m_tile": m_tile,
            "piece": self.piece,
            "block": _block(self.dtypes[1]),
        }
        return {**types, **tiles, "num_warps": WARPS}


def project(g: Sequence[Tensor], Q: Sequence[Tensor], into: bool) -> list[Tensor]:
    """Two passes over Q, one launch each for every pair of dtypes in the list."""
    m, k = g[0].shape[0], Q[0].shape[0]
    if k > MAX_K or any(t.dtype not in TYPES for t in (*g, *Q)):
        return NotImplemented
    out = [t.new_empty(t.shape) for t in g]
    order = sorted(
        (i for i, t in enumerate(out) if t.numel()), key=lambda i: str((g[i].dtype, Q[i].dtype))
    )
    if not order:
        return out
    groups, rows, counts = _plan(g, Q, out, order)
    table, owners = _to_device(rows, counts, g[0].device)
    m_tile = triton.next_power_of_2(min(m, 4))
    with on(g[0]):
        c = g[0].new_zeros(k, m, dtype=torch.float64)
        if k:
            partial = c.new_empty(groups[-1].runs_before + groups[-1].runs, k, m)
            for group in groups:
                k_tile = min(triton.next_power_of_2(k), 16, SUMS // (m_tile * max(group.piece, 4)))
                grid = (group.runs * triton.cdiv(k, k_tile) * triton.cdiv(m, m_tile),)
                _coefficients[grid](
                    table,
                    owners,
                    partial,
                    group.runs_before,
                    group.span,
                    k,
                    m,
                    **group.constants(k_tile, m_tile),
                )
            c = partial.sum(0)
        for group in groups:
            _result[(group.runs * triton.cdiv(m, m_tile),)](
                table,
                owners,
                c,
                group.runs_before,
                group.span,
                k,
                m,
                into=into,
                **group.constants(UNROLL, m_tile),
            )
    return out


def _plan(
    g: Sequence[Tensor], Q: Sequence[Tensor], out: Sequence[Tensor], order: Sequence[int]
) -> tuple[list[_Group], list[list[int]], list[int]]:
    """The groups, the table's rows, and how many runs each row has."""
    groups: list[_Group] = []
    rows: list[list[int]] = []
    counts: list[int] = []
    runs = 0
    for dtypes, members in groupby(order, key=lambda i: (g[i].dtype, Q[i].dtype)):
        indices, block = list(members), _block(dtypes[1])
        blocks = sum(triton.cdiv(g[i].shape[1], block) for i in indices)
        group = _Group(dtypes, runs, 0, block * min(max(blocks // RUNS, 1), LOOPS))
        for i in indices:
            rows.append(_row(g[i], Q[i], out[i], runs, group.piece))
            counts.append(triton.cdiv(g[i].shape[1], group.span))
            runs += counts[-1]
        groups.append(_Group(dtypes, group.runs_before, runs - group.runs_before, group.span))
    return groups, rows, counts


def _row(g: Tensor, Q: Tensor, out: Tensor, first_run: int, piece: int) -> list[int]:
    """One parameter's row of the table."""
    size = g.shape[1]
    (g_row, g_column), (q_row, q_column) = (
        # the stride of an axis of length one is arbitrary, and could look unaligned
        [stride if length > 1 else 0 for length, stride in zip(t.shape, t.stride(), strict=True)]
        for t in (g, Q)
    )
    dense = g_column == q_column == 1 and not (g_row % piece or q_row % piece or size % piece)
    aligned = dense and not any(t.data_ptr() % 16 for t in (g, Q, out))
    return [
        g.data_ptr(), g_row, g_column, Q.data_ptr(), q_row, q_column, out.data_ptr(), size, first_run, int(aligned)
    ]  # fmt: skip


def _block(dtype: torch.dtype) -> int:
    """Columns of a block: 16 bytes of Q a thread."""
    return 32 * WARPS * 16 // dtype.itemsize


def _to_device(
    rows: list[list[int]], counts: list[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The table and the row that each run belongs to, in one copy that nothing waits for."""
    table = torch.tensor(rows)
    owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    both = torch.cat([table.flatten(), owners])
    if device.type == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)
    return both[: table.numel()], both[table.numel() :]
