"""Blocks of rows as a launch takes them: those that share a side together, dtypes and strides alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import triton
from torch import Tensor

from mtu_fast.kernels.device import float64_of_halves
from mtu_fast.kernels.plans import WIDE, Plan

MANY = 16  # tensors of one launch; each adds a select to every address
# positions of one row that are summed before rows are told apart; rows are padded to a multiple
PART = 4


@dataclass(frozen=True)
class Family:
    """Blocks that share their left side: tasks of one forward.

    Attributes:
        left: Linear: `[R, S, A]`; convolution: `[R, F, z, y, x, C]`; look-up: index `[R, S]`.
        right: `[R, S, B]` each, or `[R, F, B, S]` where rows are formed; strides alike.
        starts: The first row of each block in G.
        members: Which blocks they are.
        grid: Output positions along z, y, x; ones where there is no window.
    """

    left: Tensor
    right: list[Tensor]
    starts: list[int]
    members: list[int]
    grid: tuple[int, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """Rows, positions, padded positions, the image's extents."""
        rows, positions = self.right[0].shape[:2]
        return (rows, positions, triton.cdiv(positions, PART) * PART, *self.left.shape[2:5])

    def tiles(self, tile: int) -> int:
        """Tiles of padded positions."""
        return triton.cdiv(self.size[0] * self.size[2], tile)

    def rows_of_tile(self, tile: int) -> int:
        """How many rows a tile may touch, as a power of two."""
        return min(tile // PART, triton.next_power_of_2((tile - PART) // self.size[2] + 2))


def families(
    left: Sequence[Tensor], right: Sequence[Tensor], grids: Sequence[tuple[int, ...]]
) -> Iterator[Family]:
    """Blocks by their left side, at most MANY together; those without rows, positions or features left out."""
    at, members = first_rows(right), dict[tuple[object, ...], list[int]]()
    for i, (x, y) in enumerate(zip(left, right, strict=True)):
        if x.numel() and y.numel():
            members.setdefault((identity(x), grids[i], right[i].dtype), []).append(i)
    for blocks in members.values():
        for k in range(0, len(blocks), MANY):
            some = blocks[k : k + MANY]
            first = some[0]
            rights = alike([right[i] for i in some], right[first].dim())
            yield Family(left[first], rights, [at[i] for i in some], some, grids[first])


def alike(blocks: list[Tensor], strided: int) -> list[Tensor]:
    """At most MANY blocks of one dtype whose last `strided` strides agree: what differs is copied."""
    if len(blocks) > MANY:
        # one copy costs less than a select among so many at every address
        blocks = [torch.cat(blocks)]
    dtype = reduce(torch.promote_types, (t.dtype for t in blocks))
    blocks = [t.to(dtype) for t in blocks]
    if len({t.stride()[-strided:] for t in blocks}) == 1:
        return blocks
    return [t.contiguous() for t in blocks]


def operands(blocks: Sequence[Tensor], plan: Plan) -> Sequence[Tensor]:
    """The blocks, half precision widened beforehand where the kernel cannot; shared ones stay shared."""
    if plan.operand != WIDE or float64_of_halves():
        return blocks
    wide: dict[tuple[object, ...], Tensor] = {}
    for t in blocks:
        if identity(t) not in wide:
            wide[identity(t)] = t.float() if t.element_size() <= 2 else t
    return [wide[identity(t)] for t in blocks]


def channels_last(t: Tensor) -> Tensor:
    """`[R, F, C, *]` -> `[R, F, z, y, x, C]`, neighbouring channels adjacent in memory."""
    t = t.movedim(2, -1)
    t = t.reshape(*t.shape[:2], *three(t.shape[2:-1], 1), t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()


def three(values: Sequence[int], rest: int) -> tuple[int, ...]:
    """Three numbers, `rest` for the axes that are missing."""
    return (*(rest,) * (3 - len(values)), *values)


def identity(t: Tensor) -> tuple[object, ...]:
    """Equal where two tensors are one and the same memory, seen alike."""
    return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype


def distinct(blocks: Sequence[Tensor]) -> int:
    """How many of the blocks are not one and the same."""
    return len({identity(t) for t in blocks})


def first_rows(blocks: Sequence[Tensor]) -> list[int]:
    """The first row of each block."""
    found = [0]
    for block in blocks[:-1]:
        found.append(found[-1] + len(block))
    return found
