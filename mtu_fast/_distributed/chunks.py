"""The part of a tensor that a rank holds, and that part made of parts which other ranks have written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """A block of a tensor.

    Attributes:
        start: where it begins, along each dimension.
        sizes: how long it is there.
    """

    start: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Its numbers."""
        return math.prod(self.sizes)

    def common(self, other: Chunk) -> Chunk:
        """What is in both; of no numbers where nothing is."""
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.start, self.sizes, other.start, other.sizes, strict=True)
        ]
        start = tuple(map(max, self.start, other.start))
        return Chunk(start, tuple(max(end - a, 0) for end, a in zip(ends, start, strict=True)))

    def of(self, held: Tensor, inner: Chunk) -> Tensor:
        """The numbers of a chunk inside this one, a view of those of this one."""
        for d, (a, b, n) in enumerate(zip(self.start, inner.start, inner.sizes, strict=True)):
            held = held.narrow(d, b - a, n)
        return held


def is_cut(t: object) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(t, "placements")


def chunk_of(t: Any) -> Chunk:
    """The part of a tensor that this rank holds: all of a plain one."""
    if not is_cut(t):
        return Chunk((0,) * t.dim(), tuple(t.shape))
    # what torch's own checkpoints ask of a DTensor, for any placements
    (found,) = t.__create_chunk_list__()
    return Chunk(tuple(found.offsets), tuple(found.sizes))


def local_of(t: Any) -> Tensor:
    """The numbers that this rank holds."""
    found: Tensor = t.to_local() if is_cut(t) else t
    return found


def whole(t: Any) -> Tensor:
    """All numbers of a tensor; of a DTensor a collective."""
    found: Tensor = t.full_tensor() if is_cut(t) else t
    return found


def held_as(
    like: Any, dtype: torch.dtype, chunks: Iterable[Chunk], read: Callable[[int], Tensor]
) -> Tensor:
    """A tensor cut as another one, whose numbers lie in chunks.

    Args:
        like: of the same shape: a DTensor or a plain one.
        dtype: of the numbers.
        chunks: which do not overlap.
        read: the numbers of a chunk by its place among them; called for those that are needed.

    Returns:
        The tensor; no more of it is held than this rank's part.

    Raises:
        ValueError: the chunks leave something out.
    """
    mine = chunk_of(like)
    own = torch.empty_like(local_of(like), dtype=dtype)
    left = mine.numel
    for i, chunk in enumerate(chunks):
        both = mine.common(chunk)
        if both.numel:
            mine.of(own, both).copy_(chunk.of(read(i), both))
            left -= both.numel
    if left:
        raise ValueError(f"found all but {left} numbers of a part of shape {mine.sizes}.")
    return with_local(like, own)


def with_local(like: Any, own: Tensor) -> Tensor:
    """A tensor cut as another one, of which this rank holds `own`."""
    if not is_cut(like):
        return own
    # of a parameter the tensor beneath: FSDP's own class derives from it
    kind = type(like.data)
    found: Tensor = kind.from_local(
        own,
        like.device_mesh,
        like.placements,
        # a check would be a collective
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return found
