"""`T J` of tall rows with float64 products: each tile of columns is read once, transformed and written.

Up to 64 rows, one tile holds them all; above, output rows are made 64 at a time and the rows read
as many times (16, on GPUs whose float64 is slow and takes all the time).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtu_fast.kernels.convert import narrow, widen
from mtu_fast.kernels.device import FAST_FLOAT64, arch, float64_dots, on

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_K = 512
# most rows of T and of J at once, and elements of a tile: with tensor cores of float64, and without,
# where an operand lies in registers as a whole
TILE, FMA_TILE = (64, 1 << 12), (16, 1 << 11)
WARPS = 4
# 3.6 fails to compile them
WIDENED_HALVES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)


@triton.jit
def _transform(
    rows, T, out, K, P, tiles, rows_batch, rows_row, rows_column, T_batch, T_row, T_column,
    k_tile: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """One tile `[k_tile, columns]` of `T rows` of one matrix of the batch; out is dense."""
    program, k_tiles = tl.program_id(0).to(tl.int64), tl.cdiv(K, k_tile)
    k_first, b = program % k_tiles * k_tile, program // k_tiles // tiles
    at = program // k_tiles % tiles * columns + tl.arange(0, columns)
    to = k_first + tl.arange(0, k_tile)
    sums = tl.zeros([k_tile, columns], tl.float64)
    for first in range(0, K, k_tile):
        k = first + tl.arange(0, k_tile).to(tl.int64)
        inside = (k < K)[:, None] & (at < P)[None, :]
        there = (to < K)[:, None] & (k < K)[None, :]
        tile = tl.load(
            rows + b * rows_batch + k[:, None] * rows_row + at[None, :] * rows_column, mask=inside, other=0.0
        )  # fmt: skip
        weights = tl.load(
            T + b * T_batch + to[:, None] * T_row + k[None, :] * T_column, mask=there, other=0.0
        )
        sums = tl.dot(weights, widen(tile), sums, out_dtype=tl.float64)
    place = out + (b * K + to[:, None]) * P + at[None, :]
    tl.store(place, narrow(sums, out.dtype.element_ty), mask=(to < K)[:, None] & (at < P)[None, :])


def transform(rows: Sequence[Tensor], T: Tensor) -> list[Tensor]:
    """One launch a tensor."""
    if T.shape[-1] > MAX_K or T.dtype != torch.float64 or any(t.dtype not in TYPES for t in rows):
        return NotImplemented
    with on(T):
        return _launch(rows, T) if float64_dots(arch()) else NotImplemented


def _launch(rows: Sequence[Tensor], T: Tensor) -> list[Tensor]:
    out = [t.new_empty(t.shape) for t in rows]
    # tl.dot takes 16 rows at least
    most, elements = TILE if arch() in FAST_FLOAT64 else FMA_TILE
    k_tile = min(max(triton.next_power_of_2(T.shape[-1]), 16), most)
    columns = elements // k_tile
    for t, result in zip(rows, out, strict=True):
        if t.numel() == 0:
            continue
        if t.element_size() < 4 and not WIDENED_HALVES:
            t = t.float()
        k, p = t.shape[-2:]
        tiles, batch = triton.cdiv(p, columns), t.shape[:-2].numel()
        t_batch, T_batch = (t.stride(0), T.stride(0)) if t.dim() == 3 else (0, 0)
        _transform[(triton.cdiv(k, k_tile) * tiles * batch,)](
            t, T, result, k, p, tiles, t_batch, *t.stride()[-2:], T_batch, *T.stride()[-2:],
            k_tile=k_tile, columns=columns, num_warps=WARPS, num_stages=1 if k <= k_tile else 2,
        )  # fmt: skip
    return out
