"""The dtypes of blocks, and how blocks lie in G."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from mtu_fast._ops._pooling import Into, rows_of_gram

WIDE = torch.float64


def working_dtype(t: Tensor) -> torch.dtype:
    """The dtype that row gradients are computed in: the input's, or float32 for half precision."""
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which costs as much as an op where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def square(blocks: Sequence[Tensor], into: Into = ()) -> Tensor:
    r = rows_of_gram(into, sum(t.shape[0] for t in blocks))
    return blocks[0].new_empty(r, r, dtype=WIDE)


def memory(t: Tensor) -> tuple[object, ...]:
    """Which memory a tensor is, and how it is seen."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_neg()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one and the same memory, seen alike."""
    return memory(a) == memory(b)


def families(blocks: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the blocks, those that are one and the same tensor together."""
    if len(blocks) == 1:
        return [[0]]
    families: list[list[int]] = []
    for i, block in enumerate(blocks):
        for family in families:
            if same(blocks[family[0]], block):
                family.append(i)
                break
        else:
            families.append([i])
    return families


def distinct(blocks: Sequence[Tensor]) -> list[Tensor]:
    return [blocks[family[0]] for family in families(blocks)]


def pairs(family: list[int], other: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs of blocks of two families, each unordered pair once."""
    return ((i, j) for i, j in product(family, other) if family is not other or i <= j)


def place(gram: Tensor, tile: Tensor, row: int, column: int) -> None:
    """Write a tile and its mirror image."""
    height, width = tile.shape
    gram[row : row + height, column : column + width] = tile
    gram[column : column + width, row : row + height] = tile.T


def offsets(blocks: Sequence[Tensor]) -> list[int]:
    starts = [0]
    for block in blocks:
        starts.append(starts[-1] + block.shape[0])
    return starts


def summed_products(left: Tensor, right: Tensor, shared: Tensor) -> Tensor:
    """`Σ_{s,u} shared[rs, qu] (left_rs · right_qu)`: `[R, S, B]`, `[Q, U, B]`, shared `[R·S, Q·U]` -> `[R, Q]`."""
    tile = left.flatten(0, 1) @ right.flatten(0, 1).T
    tile = tile.mul_(shared).view(len(left), left.shape[1], len(right), right.shape[1])
    return tile.sum((1, 3))
