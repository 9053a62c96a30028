"""How much is worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

# elements of a float64 tile that is read again at once: 2 MiB, what a core's cache holds
TILE = 1 << 18
# elements of explicit rows formed at a time: 16 MiB, below where allocators hand out fresh pages
BUFFER = 1 << 22
# on a GPU, an element for so many bytes of its memory: 1/128 of it in float32
BYTES_OF_GPU = 512


def buffer(device: torch.device) -> int:
    """Elements of explicit rows formed at a time: of a GPU by its memory, since each tile costs it launches."""
    return _buffer_of_gpu(device) if device.type == "cuda" else BUFFER


@lru_cache(maxsize=64)
def _buffer_of_gpu(device: torch.device) -> int:
    # asked of the driver, not of the device: nothing waits
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(memory // BYTES_OF_GPU, BUFFER)


def strips(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose strip of `rows × width` elements is one tile."""
    step = max(1, TILE // max(width, 1))
    for lo in range(0, rows, step):
        yield lo, min(lo + step, rows)
