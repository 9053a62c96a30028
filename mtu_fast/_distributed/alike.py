"""Whether the ranks' engines and models are alike, and such as can be joined."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtu_fast._distributed.ranks import Ranks
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.space import Space
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast._rows.uses import Gather, Several

WHAT = "engine.rows"


def fingerprint(space: Space) -> int:
    """A number that engines of the same parameters share."""
    shared = space.shared
    inside = zip(shared.names, map(_kind, shared.parameters), strict=True)
    outside = map(_kind, space.outside.values())
    return zlib.crc32(repr((list(inside), list(outside), shared.precision)).encode())


def _kind(p: Tensor) -> tuple[object, ...]:
    return tuple(p.shape), str(p.dtype)


def check_alike(ranks: Ranks, parameters: Iterable[Tensor]) -> None:
    """Every rank holds the same numbers.

    Raises:
        ValueError: some differ.
    """
    # a number a rank travels, in the place of the parameters
    bits = repr([bits_of(p) for p in parameters]).encode()
    sums = ranks.gathered(WHAT, [zlib.crc32(bits)])
    differ = [rank for rank, of_rank in enumerate(sums) if of_rank != sums[0]]
    if differ:
        raise ValueError(
            f"model: found other numbers on rank {differ[0]} than on rank 0, expected copies of "
            "one model: load the same weights on every rank, or broadcast those of rank 0."
        )


def bits_of(p: Tensor) -> int:
    """The sum of a parameter's bits as whole numbers, whatever the order."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = p.detach().contiguous().view(-1).view(whole[p.element_size()])
    # whole numbers wrap around, and none is lost to rounding
    return int(flat.sum(dtype=torch.int64))


def check_spaces(spaces: Sequence[int]) -> None:
    differ = [rank for rank, space in enumerate(spaces) if space != spaces[0]]
    if differ:
        raise ValueError(
            f"engine: found other parameters (names, shapes, dtypes) or another precision on rank "
            f"{differ[0]} than on rank 0, expected engines made alike on every rank."
        )


def check_dense(parts: Sequence[TaskRows], shared: Shared) -> None:
    """No table has sparse gradients: their entries would have to be joined over ranks.

    Raises:
        ValueError: one has.
    """
    for part in parts:
        for j, use in part.uses.items():
            several: Sequence[Any] = use.parts if isinstance(use, Several) else (use,)
            if any(isinstance(each, Gather) and each.sparse for each in several):
                raise ValueError(
                    f"{shared.names[j]}: found sparse gradients (sparse=True), expected dense ones "
                    "where rows of several ranks are joined; make the embedding with sparse=False."
                )
