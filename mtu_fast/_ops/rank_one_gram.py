"""The Gram of rows that are one outer product in each of several parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtu_fast._ops._arguments import check_blocks
from mtu_fast._ops._blocks import WIDE, families, memory, offsets, square
from mtu_fast._ops._library import define
from mtu_fast._ops.row_gram import row_gram


def _check_rank_one(left: Sequence[Tensor], right: Sequence[Tensor], parameters: int) -> None:
    check_blocks("highest", left=left, right=right)
    if parameters < 1 or len(left) != len(right) or not left or len(left) % parameters:
        raise ValueError(
            f"found {len(left)} and {len(right)} blocks, expected as many on both sides and for each of the "
            f"{parameters} parameters, one at least."
        )
    blocks = len(left) // parameters
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        # the block of the first parameter, and the first one of this parameter
        first = i % blocks, i - i % blocks
        expected = [
            (*left[first[0]].shape[:1], *side[first[1]].shape[1:]) for side in (left, right)
        ]
        if a.dim() != 2 or b.dim() != 2 or [tuple(a.shape), tuple(b.shape)] != expected:
            raise ValueError(
                f"the sides of block {i} have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected {expected[0]} and "
                f"{expected[1]}: [R_i, width], the rows of the first parameter and one width in all blocks of a side."
            )


@define(
    "rank_one_gram(Tensor[] left, Tensor[] right, int parameters) -> Tensor", check=_check_rank_one
)
def rank_one_gram(left: Sequence[Tensor], right: Sequence[Tensor], parameters: int) -> Tensor:
    """`G = Σ_j (L_j L_jᵀ) ∘ (R_j R_jᵀ)`: rows that are one outer product, `left ⊗ right`, in several parameters j.

    Blocks left `[R_i, A_j]` and right `[R_i, B_j]`, those of a parameter together -> float64 `[R,
    R]`.
    """
    blocks = len(left) // parameters
    sides = [side[j : j + blocks] for j in range(0, len(left), blocks) for side in (left, right)]
    keys = [tuple(map(memory, side)) for side in sides]
    last = {key: i for i, key in enumerate(keys)}
    grams: dict[tuple[tuple[object, ...], ...], Tensor] = {}
    gram = left[0].new_zeros(*2 * (sum(t.shape[0] for t in left[:blocks]),), dtype=WIDE)
    for i, (key, side) in enumerate(zip(keys, sides, strict=True)):
        if key not in grams:
            grams[key] = _side_gram(side)
        if i % 2:
            gram.addcmul_(grams[keys[i - 1]], grams[key])
            grams = {key: of_side for key, of_side in grams.items() if last[key] > i}
    return gram


def _side_gram(blocks: Sequence[Tensor]) -> Tensor:
    """`row_gram`, rows of blocks that are one and the same tensor multiplied once."""
    groups = families(blocks)
    if len(groups) == len(blocks):
        return row_gram(blocks)
    starts = dict(
        zip((f[0] for f in groups), offsets([blocks[f[0]] for f in groups]), strict=False)
    )
    first = {i: starts[family[0]] for family in groups for i in family}
    at = torch.cat([torch.arange(len(t), device=t.device) + first[i] for i, t in enumerate(blocks)])
    return row_gram([blocks[f[0]] for f in groups])[at[:, None], at]


@rank_one_gram.fake
def _(left: Sequence[Tensor], right: Sequence[Tensor], parameters: int) -> Tensor:
    return square(left[: len(left) // parameters])
