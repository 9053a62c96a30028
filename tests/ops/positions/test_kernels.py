"""Kernels of positions: threads, memory, the arguments they check by themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtu_fast._ops.gram import conv_direct, conv_ghost, outer_direct, outer_ghost
from mtu_fast._ops.grouped import grouped_rows
from tests.ops.positions.exact import (
    built,
    walk,
)


def calls() -> dict[str, Callable[[], Tensor]]:
    left, right = torch.randn(11, 37, 70), [torch.randn(11, 37, 300) for _ in range(2)]
    x, b = torch.randn(9, 1, 40, 7, 7), [torch.randn(9, 1, 30, 7, 7) for _ in range(2)]
    return {
        "outer_ghost": lambda: outer_ghost([left] * 2, right, "highest"),
        "outer_direct": lambda: outer_direct([left] * 2, right, "highest"),
        "conv_ghost": lambda: conv_ghost([x] * 2, b, *walk()),
        "conv_direct": lambda: conv_direct([x] * 2, b, *walk()),
    }


KERNELS = ["outer_ghost", "outer_direct", "conv_ghost", "conv_direct"]


@built
@pytest.mark.parametrize("name", KERNELS)
def test_the_same_bits_whatever_the_threads(name: str) -> None:
    call = calls()[name]
    first, threads = call(), torch.get_num_threads()
    assert torch.equal(first, first.T)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(call(), first)
    finally:
        torch.set_num_threads(threads)


@built
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_is_what_runs(name: str) -> None:
    call = calls()[name]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = {event.key for event in profile.key_averages()}
    assert f"mtu_fast::{name}" in names
    # the references' own
    assert not names & {"aten::mm", "aten::bmm", "aten::mul_", "aten::sum", "aten::copy_"}


PEAK = """
import torch
from mtu_fast._ops.gram import conv_direct, conv_ghost, outer_direct, outer_ghost
torch.set_num_threads(1)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10
side, image, large = torch.randn(16, 512, 4), torch.randn(8, 1, 4, 32, 32), torch.randn(1, 1, 2, 90, 90)
outer_ghost([side[:1]], [side[:1]], "highest")
before = peak()
outer_ghost([side], [side], "highest")
conv_ghost([image], [image], [3, 3], [1, 1], [1, 1], [1, 1], "highest")
conv_ghost([large], [large], [3, 3], [1, 1], [1, 1], [1, 1], "highest")
wide, deep = torch.randn(48, 2, 1000), torch.randn(48, 1, 64, 8, 8)
outer_direct([wide], [wide], "highest")
conv_direct([deep], [deep], [9, 9], [1, 1], [4, 4], [1, 1], "highest")
print(peak() - before)
"""


@built
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_neither_products_of_all_positions_nor_rows_are_held() -> None:
    """8192 positions: their products are 512 MiB; 48 rows of a million and of 330 thousand: 192 MiB and 64."""
    result = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 64


@built
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: outer_ghost.overload([torch.ones(2, 3, 4)], [torch.ones(2, 4, 4)], "highest"),
         "block 0 differ: 2 by 3 and 2 by 4"),
        (lambda: outer_ghost.overload([torch.ones(2, 3, 4)] * 2, [torch.ones(2, 3, 4)], "highest"), "got 2 and 1"),
        (lambda: outer_ghost.overload([torch.ones(2, 3)], [torch.ones(2, 3)], "highest"),
         "of 3 dimensions, got 2 and 2"),
        (lambda: outer_ghost.overload(
            [torch.ones(2, 3, 4), torch.ones(2, 3, 5)], [torch.ones(2, 3, 4)] * 2, "highest"),
         "one width, got 4 by 4 and 5 by 4"),
        (lambda: conv_ghost.overload([torch.ones(1, 1, 2, 5, 5)], [torch.ones(1, 1, 2, 5, 4)], *walk()),
         "4 output positions along axis 1, expected 5"),
        (lambda: conv_ghost.overload([torch.ones(1, 1, 2, 5, 5)], [torch.ones(1, 1, 2, 5, 5)], *walk(stride=0)),
         "positive kernel, stride"),
        (lambda: conv_ghost.overload([torch.ones(1, 1, 2, 5, 5)], [torch.ones(1, 1, 2, 5, 5)],
                            [3, 3], [1], [1, 1], [1, 1], "highest"),
         "differ in length: 2, 1, 2 and 2"),
        (lambda: grouped_rows.overload(torch.ones(1, 1, 2, 5, 5), torch.ones(1, 1, 4, 5, 5), 4, *walk()[:4]),
         "4 groups do not divide 2 and 4 channels"),
        (lambda: grouped_rows.overload(torch.ones(1, 1, 2, 5, 5), torch.ones(1, 1, 2, 5, 4), 2, *walk()[:4]),
         "4 output positions along axis 1, expected 5"),
        (lambda: grouped_rows.overload(torch.ones(1, 1, 2), torch.ones(1, 1, 2), 2, [], [], [], []),
         "an axis at least"),
    ],
)  # fmt: skip
def test_the_kernel_checks_its_own_arguments(call: Callable[[], Tensor], message: str) -> None:
    """Whoever calls it by the dispatcher alone."""
    with pytest.raises(RuntimeError, match=message):
        call()
