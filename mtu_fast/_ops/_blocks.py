"""What the Grams ask of their blocks, and how blocks lie in G."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, product

import torch
from torch import Tensor

WIDE = torch.float64
PRECISIONS = ("highest", "high", "medium")


# ---- arguments -----------------------------------------------------------------------------------


def check_blocks(precision: str, *sides: Sequence[Tensor]) -> None:
    """What every Gram here asks of its arguments.

    Raises:
        TypeError: complex blocks, of which kernels would read the real part alone.
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision: found {precision!r}, expected one of {', '.join(map(repr, PRECISIONS))}."
        )
    for block in chain.from_iterable(sides):
        if block.is_complex():
            raise TypeError(
                f"found a block of {block.dtype}, expected real ones: the Gram of complex rows is that of "
                "torch.view_as_real(rows).flatten(1)."
            )


def check_sides(
    left: Sequence[Tensor], right: Sequence[Tensor], precision: str = "highest"
) -> None:
    """Blocks left `[R_i, S_i, A, *]` and right `[R_i, S_i, B, *]`.

    Raises:
        TypeError: complex blocks.
        ValueError: an unknown precision, sides that do not belong together, or blocks of different
            widths.
    """
    check_blocks(precision, left, right)
    _check_paired(left, right)
    for side in (left, right):
        for i, block in enumerate(side):
            if block.dim() < 3 or block.shape[2] != side[0].shape[2]:
                raise ValueError(
                    f"block {i} has shape {tuple(block.shape)}, the first one {tuple(side[0].shape)}, expected "
                    "[rows, positions, width, ...], one width in all blocks of a side."
                )


def check_lookups(
    index: Sequence[Tensor], values: Sequence[Tensor], precision: str = "highest"
) -> None:
    """Blocks index `[R_i, S_i]`, whole numbers, and values `[R_i, S_i, D]`.

    Raises:
        TypeError: complex values, or an index of another dtype.
        ValueError: an unknown precision, sides that do not belong together, or values of different
            widths.
    """
    check_blocks(precision, values)
    _check_paired(index, values)
    for i, (where, value) in enumerate(zip(index, values, strict=True)):
        if where.is_floating_point() or where.is_complex() or where.dtype == torch.bool:
            raise TypeError(f"block {i} has an index of {where.dtype}, expected whole numbers.")
        if where.dim() != 2 or value.dim() != 3 or value.shape[2] != values[0].shape[2]:
            raise ValueError(
                f"block {i} has index {tuple(where.shape)} and values {tuple(value.shape)}, expected [rows, positions] "
                "and [rows, positions, width], one width in all blocks."
            )


def check_images(
    x: Sequence[Tensor], b: Sequence[Tensor], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], precision: str,
) -> None:  # fmt: skip
    """Blocks x `[R_i, F, C, *]` and b `[R_i, F, O, *]`, b on the grid on which the kernel walks over x.

    Raises:
        TypeError: complex blocks.
        ValueError: an unknown precision, sides that do not belong together, or another grid.
    """
    check_sides(x, b, precision)
    walk = (list(kernel), list(stride), list(padding), list(dilation))
    if (
        len({len(part) for part in walk}) > 1
        or min(chain(kernel, stride, dilation)) < 1
        or min(padding) < 0
    ):
        raise ValueError(
            f"kernel, stride, padding and dilation are {walk}, expected one number an axis each, of which only padding "
            "may be 0."
        )
    axes = list(zip(*walk, strict=True))
    for i, (image, gradient) in enumerate(zip(x, b, strict=True)):
        sizes = image.shape[3:]
        grid = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, (k, s, p, d) in zip(sizes, axes, strict=False)
        ]
        if len(sizes) != len(axes) or list(gradient.shape[3:]) != grid:
            raise ValueError(
                f"block {i} has images of {tuple(sizes)} and gradients of {tuple(gradient.shape[3:])}, expected "
                f"{tuple(grid)} for {len(axes)} axes."
            )


def _check_paired(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    if not left or len(left) != len(right):
        raise ValueError(
            f"found {len(left)} blocks on one side and {len(right)} on the other, expected as many, one at least."
        )
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.dim() < 2 or a.shape[:2] != b.shape[:2]:
            raise ValueError(
                f"the sides of block {i} have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected the same rows and "
                "positions, [R_i, S_i, ...]."
            )


def working_dtype(t: Tensor) -> torch.dtype:
    """The dtype that row gradients are computed in: the input's, or float32 for half precision."""
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype


# ---- places --------------------------------------------------------------------------------------


def square(blocks: Sequence[Tensor]) -> Tensor:
    r = sum(t.shape[0] for t in blocks)
    return blocks[0].new_empty(r, r, dtype=WIDE)


def memory(t: Tensor) -> tuple[object, ...]:
    """Which memory a tensor is, and how it is seen."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_neg()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one and the same memory, seen alike."""
    return memory(a) == memory(b)


def families(blocks: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the blocks, those that are one and the same tensor together."""
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
