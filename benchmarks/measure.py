"""Time callables side by side, and the peak memory of one in a process of its own.

Machines drift (clock, other people's work), so competitors run interleaved, in rounds that each
start with another one, and a ratio is the median over rounds of the ratio within a round. Resident
memory is largely the allocator's, so memory is measured apart from time, with an allocator that
gives freed blocks back (`ALLOCATOR`), for every competitor; and time with one that keeps them (`keep_heap`).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
# no trimming below 1 GiB, and blocks of up to 32 MiB from the heap
KEEPING = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}  # their numbers in malloc.h
MIB = 1024.0
# calls before the one whose memory is measured, and before those that are timed: an engine compares
# its rows with an ordinary backward in calls 1, 2, 3, 5, 9, then 17
BEFORE, SETTLED = 3, 9


@dataclass(frozen=True)
class Times:
    """Milliseconds of one callable, round by round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        return _spread(self.rounds)

    def ratio(self, base: Times) -> tuple[float, float]:
        """(median, spread) over rounds of this time over that of `base` in the same round."""
        ratios = [mine / theirs for mine, theirs in zip(self.rounds, base.rounds, strict=True)]
        return statistics.median(ratios), _spread(ratios)


def _spread(values: list[float] | tuple[float, ...]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def wait_for(device: str) -> Callable[[], object]:
    """What returns when `device` has done all it was given: work on a GPU goes on after the call that starts it."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def keep_heap() -> None:
    """Let glibc keep what is freed at the top of its heap.

    Whether it does is otherwise a lottery of addresses: in some processes a step faults in anew the pages that
    the step before gave back, in others it does not, and the one who pays is not the one who freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has none
    if mallopt is not None:
        for name, value in KEEPING.items():
            mallopt(MALLOPT[name], int(value))


def interleaved(
    callables: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    device: str = "cpu",
) -> dict[str, Times]:
    """{name: ms of each round}: every callable once a round, rounds beginning with a different one each time.

    Args:
        callables: the competitors; what they return is dropped before the clock stops.
        repeats: rounds that count, at least 1.
        warmup: rounds before, that do not count.
        device: where they work; the clock starts when it is idle and stops when it is idle again.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; a median needs at least one round")
    keep_heap()
    names, wait = list(callables), wait_for(device)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()  # a collection in one competitor's turn would be charged to it alone
    try:
        for turn in range(-warmup, repeats):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                wait()
                start = time.perf_counter()
                callables[name]()
                wait()
                elapsed = (time.perf_counter() - start) * 1e3
                if turn >= 0:
                    rounds[name].append(elapsed)
            gc.collect()
    finally:
        gc.enable()
    return {name: Times(tuple(values)) for name, values in rounds.items()}


def peak_memory(factory: str, *args: str, timeout: float = 600.0) -> float:
    """MiB that one call needs at its peak above what is loaded before it, measured in a fresh process.

    The process calls the factory, which loads all that is not to be counted and returns the
    callable. Resident memory now is the base. The callable runs three times, so that what it keeps
    between calls exists and counts; then the kernel's high-water mark is reset
    (`/proc/self/clear_refs`) and a fourth call sets the peak. The engine compares rows with an
    ordinary backward in its calls 1, 2, 3, 5, 9, …, so that the fourth is an ordinary one. Linux
    only.

    Args:
        factory: "package.module:function", called with `args`, returns a callable without
            arguments.
        args: strings for the factory.
        timeout: seconds the process may take.

    Raises:
        RuntimeError: the process failed; its error output is in the message.
    """
    command = [sys.executable, "-m", "benchmarks.measure", factory, *args]
    child = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | ALLOCATOR,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(
            f"measuring {factory} {' '.join(args)} ended with {child.returncode}:\n{child.stderr}"
        )
    return float(json.loads(child.stdout.splitlines()[-1])["peak"])


def _child(factory: str, *args: str) -> None:
    module, _, function = factory.partition(":")
    step: Callable[[], object] = getattr(importlib.import_module(module), function)(*args)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    base = _status("VmRSS")
    for _ in range(BEFORE):
        step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    print(json.dumps({"base": base, "peak": _status("VmHWM") - base}))


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / MIB


if __name__ == "__main__":
    _child(*sys.argv[1:])
