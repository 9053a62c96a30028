"""How much is worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator

# elements of a float64 tile that is read again at once: 2 MiB, what a core's cache holds
TILE = 1 << 18
# elements of explicit rows formed at a time: 16 MiB, below where allocators hand out fresh pages
BUFFER = 1 << 22


def strips(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose strip of `rows × width` elements is one tile."""
    step = max(1, TILE // max(width, 1))
    for lo in range(0, rows, step):
        yield lo, min(lo + step, rows)
