"""The Gram of rows that are one outer product in each of several parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtu_fast._ops._arguments import check_blocks, check_known
from mtu_fast._ops._blocks import WIDE, families, memory, offsets, square
from mtu_fast._ops._library import define
from mtu_fast._ops.row_gram import row_gram


def _check_rank_one(
    left: Sequence[Tensor], right: Sequence[Tensor], parameters: int, known: int = 0
) -> None:
    check_blocks("highest", left=left, right=right)
    if parameters < 1 or len(left) != len(right) or not left or len(left) % parameters:
        raise ValueError(
            f"found {len(left)} and {len(right)} blocks, expected as many on both sides and for each of the "
            f"{parameters} parameters, one at least."
        )
    blocks = len(left) // parameters
    for i in range(len(left)):
        _check_block(left, right, blocks, i)
    check_known(known, sum(t.shape[0] for t in left[:blocks]))


def _check_block(left: Sequence[Tensor], right: Sequence[Tensor], blocks: int, i: int) -> None:
    """As many rows as in this block of the first parameter, as wide as the first block of this parameter."""
    same_rows, same_width = i % blocks, i - i % blocks
    rows = left[same_rows].shape[:1]
    found = [tuple(side[i].shape) for side in (left, right)]
    expected = [(*rows, *side[same_width].shape[1:]) for side in (left, right)]
    if any(len(shape) != 2 for shape in found) or found != expected:
        raise ValueError(
            f"the sides of block {i} have shapes {found[0]} and {found[1]}, expected {expected[0]} and "
            f"{expected[1]}: [R_i, width], the rows of the first parameter and one width in all blocks of a side."
        )


@define(
    "rank_one_gram(Tensor[] left, Tensor[] right, int parameters, int known=0) -> Tensor",
    check=_check_rank_one,
)
def rank_one_gram(
    left: Sequence[Tensor], right: Sequence[Tensor], parameters: int, known: int = 0
) -> Tensor:
    """`G = Σ_j (L_j L_jᵀ) ∘ (R_j R_jᵀ)`: rows that are one outer product, `left ⊗ right`, in several parameters j.

    Blocks left `[R_i, A_j]` and right `[R_i, B_j]`, those of a parameter together -> float64 `[R,
    R]`. Products of the last `known` rows with one another are left out: zeros.
    """
    blocks = len(left) // parameters
    sides: list[Sequence[Tensor]] = []
    for j in range(0, len(left), blocks):
        sides += [left[j : j + blocks], right[j : j + blocks]]
    rows = sum(len(t) for t in left[:blocks])
    of_sides = _SideGrams(sides, rows - known)
    gram = left[0].new_zeros(rows, rows, dtype=WIDE)
    for i in range(0, len(sides), 2):
        # ⟨a ⊗ b, a' ⊗ b'⟩ = ⟨a, a'⟩ ⟨b, b'⟩
        gram.addcmul_(of_sides.of(i), of_sides.of(i + 1))
        of_sides.forget(i + 2)
    gram[rows - known :, rows - known :] = 0.0  # of blocks that only in part are known
    return gram


class _SideGrams:
    """The Grams of sides, each of which is multiplied once and held for as long as it comes again."""

    def __init__(self, sides: Sequence[Sequence[Tensor]], fresh: int) -> None:
        self._sides = sides
        self._fresh = fresh
        self._keys = [tuple(map(memory, side)) for side in sides]
        self._last = {key: i for i, key in enumerate(self._keys)}
        self._grams: dict[tuple[tuple[object, ...], ...], Tensor] = {}

    def of(self, i: int) -> Tensor:
        """The Gram of side i."""
        key = self._keys[i]
        if key not in self._grams:
            self._grams[key] = _side_gram(self._sides[i], self._fresh)
        return self._grams[key]

    def forget(self, before: int) -> None:
        """Let go of the Grams of sides that come last before this one."""
        for key in list(self._grams):
            if self._last[key] < before:
                del self._grams[key]


def _side_gram(blocks: Sequence[Tensor], fresh: int) -> Tensor:
    """`row_gram`, rows of blocks that are one and the same tensor multiplied once.

    Of blocks that begin behind the first `fresh` rows no products with one another.
    """
    groups, first = families(blocks), offsets(blocks)
    known = sum(len(blocks[family[0]]) for family in groups if first[family[0]] >= fresh)
    if len(groups) == len(blocks):
        return row_gram(blocks, known)
    once = [blocks[family[0]] for family in groups]
    start_of: dict[int, int] = {}
    for family, start in zip(groups, offsets(once), strict=False):  # the last offset is the end
        start_of.update(dict.fromkeys(family, start))
    places = [torch.arange(len(t), device=t.device) + start_of[i] for i, t in enumerate(blocks)]
    at = torch.cat(places)
    return row_gram(once, known)[at[:, None], at]


@rank_one_gram.fake
def _(left: Sequence[Tensor], right: Sequence[Tensor], parameters: int, known: int = 0) -> Tensor:
    return square(left[: len(left) // parameters])


rank_one_gram.triton("rank_one")
