"""Grams of positions by both routes, as dispatched (the kernel, where it is built) and as references, at every border.

Small integers multiply and add without rounding in any order, so most comparisons are for equality.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtu_fast._ops import _library, _tiles
from mtu_fast._ops.gram import conv_direct, conv_ghost, outer_direct, outer_ghost, row_gram
from mtu_fast._ops.grouped import grouped_rows
from tests.helpers.tolerance import assert_as_accurate

built = pytest.mark.skipif(_library.EXTENSION is None, reason=_library.MISSING or "built")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Blocks = list[Tensor]


def named(ops: list[Any]) -> list[Any]:
    both = [(op.name, op) for op in ops] + [(f"{op.name}, reference", op.reference) for op in ops]
    return [pytest.param(function, id=name) for name, function in both]


@pytest.fixture(params=named([outer_ghost, outer_direct]))
def outer(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = request.param
    return found


@pytest.fixture(params=named([conv_ghost, conv_direct]))
def conv(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = request.param
    return found


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-3, 4, shape).to(dtype)


def outer_exact(left: Blocks, right: Blocks) -> Tensor:
    J = torch.cat([
        torch.bmm(a.double().mT, b.double()).flatten(1) for a, b in zip(left, right, strict=True)
    ])
    return J @ J.T


def walk(
    kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1, axes: int = 2
) -> tuple[Any, ...]:
    return [kernel] * axes, [stride] * axes, [padding] * axes, [dilation] * axes, "highest"


def unfolded(x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Patches of `[R, F, C, H, W]`: `[R, F·positions, C·taps]`."""
    kernel, stride, padding, dilation, _ = arguments
    patches = F.unfold(
        x.double().flatten(0, 1), kernel, dilation=dilation, padding=padding, stride=stride
    )
    return patches.mT.reshape(x.shape[0], x.shape[1] * patches.shape[2], patches.shape[1])


def conv_exact(x: Blocks, b: Blocks, arguments: tuple[Any, ...]) -> Tensor:
    return outer_exact(
        [unfolded(t, arguments) for t in x], [t.double().flatten(3).mT.flatten(1, 2) for t in b]
    )


def images(
    rows: int,
    frames: int,
    channels: int,
    size: tuple[int, int],
    out: int,
    arguments: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    x = integers(rows, frames, channels, *size)
    kernel, stride, padding, dilation, _ = arguments
    grid = [(n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)]  # fmt: skip
    return x, integers(rows, frames, out, *grid)


@pytest.mark.parametrize("sizes", [
    [(1, 1)], [(1, 7)], [(1, 8)], [(3, 8)], [(1, 95)], [(1, 96)], [(1, 97)], [(97, 1)],
    [(7, 23), (5, 11), (0, 4), (2, 0)],
    [(2, 193)], [(10, 20), (3, 65), (1, 1), (40, 2)], [(0, 3)], [(3, 0)],
])  # fmt: skip
@pytest.mark.parametrize(("a", "b"), [(1, 1), (5, 3), (257, 16), (0, 4), (520, 255)])
def test_every_number_of_positions(
    outer: Callable[..., Tensor],
    sizes: list[tuple[int, int]],
    a: int,
    b: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_tiles, "TILE", 1 << 12)
    left = [integers(r, s, a) for r, s in sizes]
    right = [integers(r, s, b) for r, s in sizes]
    found = outer(left, right, "highest")
    assert found.dtype == torch.float64
    assert torch.equal(found, outer_exact(left, right))


@built
@pytest.mark.parametrize("rows", [2_100, 9])
def test_many_positions(rows: int) -> None:
    left, right = integers(rows, 2_100 // rows + 1, 3), integers(rows, 2_100 // rows + 1, 2)
    other = integers(rows, 2_100 // rows + 1, 2)
    for outer in (outer_ghost, outer_direct):
        assert torch.equal(outer([left], [right], "highest"), outer_exact([left], [right]))
        assert torch.equal(
            outer([left] * 2, [right, other], "highest"), outer_exact([left] * 2, [right, other])
        )


@built
@pytest.mark.parametrize("rows", [1, 40, 300])
@pytest.mark.parametrize(("a", "b"), [(24, 64), (64, 25), (13, 200), (200, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_of_rows(rows: int, a: int, b: int, dtype: torch.dtype) -> None:
    """Whole panels and broken ones, either side the wider; rows that fill the cache by themselves, or leave room."""
    left, right = integers(rows, 3, a, dtype=dtype), integers(rows, 3, b, dtype=dtype)
    assert torch.equal(outer_direct([left], [right], "highest"), outer_exact([left], [right]))


@built
@pytest.mark.parametrize("positions", [191, 192, 193, 500])
def test_rows_that_are_summed_in_parts(positions: int) -> None:
    left, right = integers(3, positions, 20), integers(3, positions, 40)
    assert torch.equal(outer_direct([left], [right], "highest"), outer_exact([left], [right]))
    x, b = images(3, 2, 5, (21, 19), 7, walk())
    assert torch.equal(conv_direct([x], [b], *walk()), conv_exact([x], [b], walk()))


def test_blocks_of_different_dtypes(outer: Callable[..., Tensor]) -> None:
    left = [integers(3, 5, 33, dtype=dtype) for dtype in DTYPES]
    right = [integers(3, 5, 9, dtype=dtype) for dtype in reversed(DTYPES)]
    assert torch.equal(outer(left, right, "highest"), outer_exact(left, right))


def test_views(outer: Callable[..., Tensor]) -> None:
    every_other = integers(4, 8, 12)[::2, 1:, ::2]
    left = [
        integers(6, 20, 9).permute(1, 2, 0),
        integers(9, 6)[:, None].expand(9, 30, 6),
        every_other,
    ]
    swapped = integers(7, 2, 7).transpose(0, 1)
    right = [integers(20, 9, 1).expand(20, 9, 7), integers(1, 30, 7).expand(9, 30, 7), swapped]
    assert torch.equal(outer(left, right, "highest"), outer_exact(left, right))


def test_both_sides_shared(outer: Callable[..., Tensor]) -> None:
    a, b, c = integers(5, 30, 6), integers(5, 30, 4), integers(5, 30, 4)
    left, right = [a, a, a], [b, c, b]
    assert torch.equal(outer(left, right, "highest"), outer_exact(left, right))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 4, 12])
def test_what_is_not_finite_stays_in_its_row(
    outer: Callable[..., Tensor], value: float, place: int
) -> None:
    left, right = integers(6, 13, 5) + 0.5, integers(6, 13, 4) + 0.25
    left[4, place, 4] = value
    found = outer([left], [right], "highest")
    others = torch.tensor([0, 1, 2, 3, 5])
    assert not found[4].isfinite().any() and not found[:, 4].isfinite().any()
    assert torch.equal(found[others][:, others], outer_exact([left[others]], [right[others]]))


WALKS = {
    "3x3": walk(),
    "strided": walk(3, 2, 1),
    "dilated": walk(3, 1, 2, 2),
    "strided, dilated": walk(2, 2, 3, 3),
    "pixels left over": walk(2, 3, 0),
    "pointwise": walk(1, 1, 0),
    "pointwise, padded": walk(1, 1, 1),
    "pointwise, strided": walk(1, 2, 0),
    "patches": walk(4, 4, 0),
}


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("size", [(4, 4), (5, 9), (17, 16)])
def test_every_walk(conv: Callable[..., Tensor], name: str, size: tuple[int, int]) -> None:
    """Several images to a tile, one, and several boxes to an image; three tasks on one forward, one on another."""
    arguments = WALKS[name]
    x, b = images(3, 2, 3, size, 4, arguments)
    y, c = images(5, 1, 3, (size[1], size[0]), 4, arguments)
    xs, bs = [x, x, y, x], [b, integers(*b.shape), c, integers(*b.shape)]
    assert torch.equal(conv(xs, bs, *arguments), conv_exact(xs, bs, arguments))


def test_images_beyond_one_box_along_every_axis(conv: Callable[..., Tensor]) -> None:
    arguments = walk(3, 2, 1)
    x, b = images(1, 1, 2, (61, 47), 2, arguments)
    assert torch.equal(conv([x], [b], *arguments), conv_exact([x], [b], arguments))


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (3, 0), (0, 0)])
def test_no_channels(conv: Callable[..., Tensor], inputs: int, outputs: int) -> None:
    x, b = images(2, 1, inputs, (5, 5), outputs, walk())
    assert torch.equal(conv([x], [b], *walk()), torch.zeros(2, 2, dtype=torch.float64))


@built
@pytest.mark.parametrize("rows", [88, 92, 300])
def test_sums_by_lane_are_kept_or_folded(rows: int) -> None:
    J = integers(rows, 700)
    assert torch.equal(row_gram([J]), J.double() @ J.double().T)


def test_one_input_under_several_walks_of_sizes(conv: Callable[..., Tensor]) -> None:
    arguments = walk()
    x, b = images(4, 1, 3, (6, 6), 2, arguments)
    xs = [x, x.transpose(3, 4), x.clone(), x[:0]]
    bs = [b, integers(*b.shape).transpose(3, 4), integers(*b.shape), b[:0]]
    assert torch.equal(conv(xs, bs, *arguments), conv_exact(xs, bs, arguments))


@built
def test_rows_of_very_many_positions_are_as_accurate_as_the_vendor_s() -> None:
    left, right = torch.rand(3, 100_000, 13), torch.rand(3, 100_000, 9)
    rows = torch.bmm(left.mT, right).flatten(1).double()
    truth = outer_exact([left], [right])
    assert_as_accurate(
        "many positions", outer_direct([left], [right], "highest"), rows @ rows.T, truth
    )


@built
def test_a_pixel_that_no_tap_reaches_does_not_matter() -> None:
    arguments = walk(2, 3, 0)
    x, b = images(2, 1, 3, (6, 6), 2, arguments)
    expected = conv_exact([x], [b], arguments)
    x[:, :, :, 2, :] = float("nan")
    for conv in (conv_ghost, conv_direct):
        assert torch.equal(conv([x], [b], *arguments), expected)


@pytest.mark.parametrize("side", [0, 1])
def test_an_image_that_is_not_finite(conv: Callable[..., Tensor], side: int) -> None:
    arguments = walk()
    pair = images(5, 1, 3, (4, 4), 4, arguments)
    pair[side][2, 0, 1, 3, 3] = float("nan")
    found = conv([pair[0]], [pair[1]], *arguments)
    assert torch.equal(found.isnan(), (torch.arange(5) == 2)[:, None] | (torch.arange(5) == 2))


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


# ---- rows that are summed ------------------------------------------------------------------------

INTO = [[0, 1, 2, 3, 4], [0, 0, 1, 1, 0], [-1, 0, -1, 1, 1], [1, 0, 1, 0, 1], [-1] * 5, [0] * 5]


def summing(into: list[int]) -> Tensor:
    """S `[V, R]`, ones where a row goes."""
    S = torch.zeros(max(into) + 1, len(into), dtype=torch.float64)
    for r, row in enumerate(into):
        if row >= 0:
            S[row, r] = 1.0
    return S


@pytest.mark.parametrize("into", INTO, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 3), (4, 130, 7), (200, 3, 40), (0, 4, 4)], ids=str)
@pytest.mark.parametrize("function", named([outer_direct]))
def test_summed_rows_of_outer_products(
    function: Callable[..., Tensor],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    into: list[int],
) -> None:
    """S G Sᵀ, also where tasks share an activation and a row's positions are summed in several turns."""
    s, a, b = shape
    shared = integers(2, s, a, dtype=dtype)
    left = [shared, integers(1, s, a, dtype=dtype), shared]
    right = [integers(t.shape[0], s, b, dtype=dtype) for t in left]
    S = summing(into)
    assert torch.equal(function(left, right, "highest", into), S @ outer_exact(left, right) @ S.T)


@pytest.mark.parametrize("into", INTO, ids=str)
@pytest.mark.parametrize("function", named([conv_direct]))
def test_summed_rows_of_convolutions(function: Callable[..., Tensor], into: list[int]) -> None:
    x = [integers(2, 1, 3, 6, 6), integers(3, 1, 3, 6, 6)]
    b = [integers(t.shape[0], 1, 4, 6, 6) for t in x]
    S = summing(into)
    assert torch.equal(function(x, b, *walk(), into), S @ conv_exact(x, b, walk()) @ S.T)


@pytest.mark.parametrize(
    "into", [[0, 1], [0, 0, 0, 0, 5], [0, 0, 2, 2, 2], [-2, 0, 0, 0, 0], [0] * 6], ids=str
)
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "the kernel alone"])
def test_rows_of_the_gram_without_a_row(into: list[int], checked: bool) -> None:
    left, right = [integers(5, 2, 3)], [integers(5, 2, 4)]
    outer: Any = outer_direct if checked else outer_direct.overload
    with pytest.raises((ValueError, RuntimeError), match="into: "):
        outer(left, right, "highest", into)
    x, b = [integers(5, 1, 2, 4, 4)], [integers(5, 1, 2, 4, 4)]
    conv: Any = conv_direct if checked else conv_direct.overload
    with pytest.raises((ValueError, RuntimeError), match="into: "):
        conv(x, b, *walk(), into)
