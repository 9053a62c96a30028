"""A part of a tensor from the parts that ranks have written, however both are cut."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from mtu_fast._distributed.chunks import Chunk, held_as


def partition(shape: tuple[int, ...], generator: torch.Generator) -> list[Chunk]:
    """Blocks that make up a shape, cut at random places along every dimension; some are empty."""
    spans = []
    for size in shape:
        cuts = torch.randint(size + 1, (2,), generator=generator).sort().values.tolist()
        spans.append([(a, b - a) for a, b in pairwise([0, *cuts, size])])
    blocks = product(*spans)
    return [Chunk(*zip(*block, strict=True)) if block else Chunk((), ()) for block in blocks]


@pytest.mark.parametrize("shape", [(), (7,), (5, 4), (3, 6, 2), (0, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_parts_of_parts(shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=generator)
    everything = Chunk((0,) * t.dim(), shape)
    written = partition(shape, generator)
    slices = [everything.of(t, chunk) for chunk in written]
    assert sum(chunk.numel for chunk in written) == t.numel()
    assert torch.equal(held_as(t, t.dtype, written, slices.__getitem__), t)
    for wanted in partition(shape, generator):
        own = torch.full(wanted.sizes, torch.nan)
        for chunk, held in zip(written, slices, strict=True):
            both = wanted.common(chunk)
            if both.numel:
                wanted.of(own, both).copy_(chunk.of(held, both))
        assert torch.equal(own, everything.of(t, wanted))


def test_what_is_missing_is_an_error() -> None:
    t = torch.ones(4, 3)
    with pytest.raises(ValueError, match="all but 3 numbers"):
        held_as(t, t.dtype, [Chunk((0, 0), (3, 3))], lambda _: t[:3])


def test_only_what_is_needed_is_read() -> None:
    t, read = torch.arange(6.0), []

    def part(i: int) -> torch.Tensor:
        read.append(i)
        return t[2 * i : 2 * i + 2]

    chunks = [Chunk((2 * i,), (2,)) for i in range(3)] + [Chunk((6,), (0,))]
    assert torch.equal(held_as(t, t.dtype, chunks, part), t)
    assert read == [0, 1, 2]
