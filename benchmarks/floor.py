"""The least time a computation can take on a machine: its bytes and its FLOPs over what the machine was measured to do.

The ceilings are measured, not read from a data sheet: the bandwidth of reading and of copying
arrays far larger than any cache, and the rate of one large product in float32 (TF32 off) and in
float64. Bytes and FLOPs overlap at best, so the floor is the longer of the two times. What is in a
cache already, or computed on units these products do not use, can be faster than the floor; a
fraction above 1 says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.measure import interleaved


@dataclass(frozen=True)
class Cost:
    """What a computation cannot do without: bytes read and written, FLOPs by precision (a multiply-add is 2)."""

    read: float = 0.0
    written: float = 0.0
    flops32: float = 0.0
    flops64: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do: bytes a second read, and copied (both ways counted), FLOPs a second."""

    read: float
    copy: float
    float32: float
    float64: float

    def floor(self, cost: Cost) -> float:
        """Seconds that `cost` takes at least."""
        moving = cost.read / self.read + cost.written / self.copy
        computing = cost.flops32 / self.float32 + cost.flops64 / self.float64
        return max(moving, computing)

    def __str__(self) -> str:
        rates = (
            f"float32 {self.float32 / 1e9:.0f} GFLOP/s, float64 {self.float64 / 1e9:.0f} GFLOP/s"
        )
        return f"reading {self.read / 1e9:.1f} GB/s, copying {self.copy / 1e9:.1f} GB/s, {rates}"


# of the float32 arrays read and copied
ELEMENTS = {"quick": 1 << 18, "cpu": 1 << 26, "cuda": 1 << 28}
PRODUCT = {"quick": 64, "cpu": 2048, "cuda": 8192}  # side of the square matrices multiplied
ROUNDS = 7


@cache
def ceilings(device: str, quick: bool = False) -> Ceilings:
    """Measure `device` with the threads there are now; the best of a few rounds counts. Once a process.

    Args:
        device: "cpu" or "cuda".
        quick: arrays that fit into a cache: does it run, not how fast.
    """
    size = "quick" if quick else device.partition(":")[0]
    read, copy = _bandwidths(ELEMENTS[size], device)
    return Ceilings(
        read,
        copy,
        *(_product_rate(t, PRODUCT[size], device) for t in (torch.float32, torch.float64)),
    )


def _bandwidths(elements: int, device: str) -> tuple[float, float]:
    """Bytes a second of the fastest way to read an array, and of copying one."""
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    tall = source.view(64, -1)
    reading: dict[str, Callable[[], object]] = {
        "sum": source.sum,
        "dot": lambda: torch.dot(source, source),
        "maximum": source.max,
        "product": lambda: tall @ tall[0],
    }
    read = 4.0 * elements / _best(reading, device)
    return read, 8.0 * elements / _best({"copy": lambda: target.copy_(source)}, device)


def _product_rate(dtype: torch.dtype, n: int, device: str) -> float:
    a, b, out = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(3))
    return 2.0 * n**3 / _best({"product": lambda: torch.mm(a, b, out=out)}, device)


def _best(callables: dict[str, Callable[[], object]], device: str) -> float:
    """Seconds of the fastest round of the fastest callable."""
    times = interleaved(callables, ROUNDS, device=device)
    return min(min(each.rounds) for each in times.values()) / 1e3
