"""Rows of convolutions and linear layers in Triton, and Grams by rows that are formed so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast._ops import _tiles
from mtu_fast._ops import conv_direct as by_rows
from mtu_fast._ops import outer_direct as outer_by_rows
from mtu_fast._ops._convolution import Geometry, plain_rows
from mtu_fast._ops.conv_direct import conv_direct
from mtu_fast._ops.grouped import grouped_rows
from mtu_fast._ops.outer_direct import outer_direct
from mtu_fast._ops.unordered_rows import unordered_rows
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.truth import relative_error
from tests.ops.test_grouped import LAYOUTS, WALKS, explicit, grid

pytest.importorskip("triton", reason="needs Triton")
from mtu_fast.kernels import blocks as kernel_blocks
from mtu_fast.kernels import explicit as whole
from mtu_fast.kernels import plans, rows
from tests.helpers.triton import SHARED, compiled, table
from tests.kernels.gram.blocks import CONVS, DEVICES, DTYPES, Blocks, conv_blocks, draw, geometry
from tests.kernels.gram.test_all import sparse

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("device", DEVICES)]
Walk = tuple[list[int], list[int], list[int], list[int]]
LINEAR: Walk = ([1], [1], [0], [1])


def walk_of(g: Geometry) -> Walk:
    return list(g.kernel), list(g.stride), list(g.padding), list(g.dilation)


def expected(x: Tensor, b: Tensor, g: Geometry, dtype: torch.dtype) -> Tensor:
    """Columns by (output, tap, channel), as the kernel has them for a Gram."""
    found = plain_rows(x.to(dtype), b.to(dtype), g).flatten(3)
    return found.transpose(2, 3).flatten(1)


def formed(xs: Blocks, bs: Blocks, g: Geometry, precision: str = "highest") -> Blocks:
    """What the launcher makes; float64 is for GPUs that multiply it fast."""
    found = rows.unordered_rows(xs, bs, *walk_of(g), precision)
    if found is NotImplemented and xs[0].is_cuda and xs[0].dtype == torch.float64:
        pytest.skip("the vendor's products serve this GPU")
    return list(found)


def grouped(x: Tensor, b: Tensor, groups: int, *walk: Any) -> Tensor:
    found = rows.grouped_rows(x, b, groups, *walk)
    if found is NotImplemented and x.is_cuda and x.dtype == torch.float64:
        pytest.skip("the vendor's products serve this GPU")
    return found


def check(
    name: str, found: Blocks, xs: Blocks, bs: Blocks, g: Geometry, plain: torch.dtype
) -> None:
    for i, (rows_i, x, b) in enumerate(zip(found, xs, bs, strict=True)):
        truth = expected(x, b, g, torch.float64)
        assert rows_i.dtype == (
            torch.float64 if torch.float64 in (x.dtype, b.dtype) else torch.float32
        )
        if truth.numel():
            assert_as_accurate(f"{name}, {i}", rows_i, expected(x, b, g, plain), truth)
        assert rows_i.shape == truth.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in CONVS if name != "2d, pointwise"])
def test_rows_of_every_walk(device: str, name: str, dtype: torch.dtype) -> None:
    """Two forwards; float32 by exact products where float64 is fast."""
    g, image = geometry(name), CONVS[name][1]
    xs, bs = conv_blocks(device, g, [(3, 1, *image), (1, 2, *image)], dtype)
    plain = torch.float64 if dtype == torch.float64 else torch.float32
    check(name, formed(xs, bs, g), xs, bs, g, plain)


@pytest.mark.parametrize(
    "image", [(5, 1, 1), (1, 5, 1), (1, 1, 5), (5, 1, 4), (4, 5, 1), (1, 1, 1)]
)
def test_images_that_are_lines(device: str, image: tuple[int, ...]) -> None:
    g = Geometry((3, 2, 3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), False, (0, 0, 0), 1)
    (x,), (b,) = conv_blocks(device, g, [(2, 2, *image)], torch.float32)
    found = grouped(x, b, 1, *walk_of(g))
    assert relative_error(found, plain_rows(x.double(), b.double(), g)) <= 1e-7


@pytest.mark.parametrize("sizes", [(17, 21), (3, 130), (130, 3), (70, 65)])
def test_tiles_are_not_whole(device: str, sizes: tuple[int, int]) -> None:
    channels, outputs = sizes
    g = Geometry((outputs, channels, 2, 1), (1, 1), (1, 0), (1, 1), False, (0, 0), 1)
    for dtype in (torch.float32, torch.bfloat16):
        xs, bs = conv_blocks(device, g, [(2, 1, 6, 7)], dtype)
        check(f"{sizes}", formed(xs, bs, g, "high"), xs, bs, g, torch.float32)


@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(5, 5, 5), (2, 6, 4)])
@pytest.mark.parametrize("name", ["unequal", "kernel beyond the image", "one tap", "1d", "3d"])
def test_groups(device: str, name: str, groups: int, inputs: int, outputs: int) -> None:
    *walk, size = WALKS[name]
    x = draw(device, 3, 2, inputs, *size, dtype=torch.float64)
    b = draw(device, 3, 2, outputs, *grid(WALKS[name]), dtype=torch.float64)
    found = grouped(x, b, groups, *walk)
    assert found.is_contiguous()
    assert relative_error(found, explicit(x, b, groups, *walk)) <= 1e-14


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_memory_layouts(device: str, layout: str, stride: int) -> None:
    walk = ((3, 3), (stride, stride), (1, 1), (1, 1))
    x = draw(device, 4, 1, 6, 8, 6, dtype=torch.float64)
    b = draw(device, 4, 1, 6, *grid((*walk, (8, 6))), dtype=torch.float64)
    x, b = LAYOUTS[layout](x), LAYOUTS[layout](b)
    truth = explicit(x.contiguous(), b.contiguous(), 3, *walk)
    assert relative_error(grouped(x, b, 3, *walk), truth) <= 1e-14


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_rows_of_linear_layers_are_a_convolution_of_one_tap(device: str, precision: str) -> None:
    """Where TF32 is allowed and pays; else the vendor's product serves."""
    left, right = draw(device, 3, 70, 19), draw(device, 3, 70, 33)
    xs, bs = [left.mT[:, None]], [right.mT[:, None]]
    g = Geometry((33, 19, 1), (1,), (0,), (1,), False, (0,), 1)
    plain = torch.bfloat16 if precision == "medium" and device == "cuda" else torch.float32
    check(precision, rows.unordered_rows(xs, bs, *LINEAR, precision), xs, bs, g, plain)
    assert rows.unordered_rows(xs, bs, *LINEAR, "highest") is NotImplemented
    halves = [xs[0].bfloat16()], [bs[0].bfloat16()]
    assert rows.unordered_rows(*halves, *LINEAR, precision) is NotImplemented


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grid of every launch that forms rows."""
    found: list[tuple[int, ...]] = []
    kernel = rows._form

    class Watched:
        def __getitem__(self, launched: tuple[int, ...]) -> Any:
            found.append(launched)
            return kernel[launched]

    monkeypatch.setattr(rows, "_form", Watched())
    return found


def test_tasks_of_one_forward_are_one_launch(
    device: str, launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = geometry("2d")
    (x, y), (b, c) = conv_blocks(device, g, [(2, 1, 5, 4), (1, 2, 3, 6)], torch.float32)
    xs, bs = [x, y, x, x], [b, c, draw(device, *b.shape), 0 * b]
    check("tasks", formed(xs, bs, g), xs, bs, g, torch.float32)
    assert len(launches) == 2
    monkeypatch.setattr(kernel_blocks, "MANY", 2)
    check("many", formed(xs, bs, g), xs, bs, g, torch.float32)
    assert len(launches) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_few_tiles_split_the_positions(
    device: str,
    dtype: torch.dtype,
    launches: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Partial sums are added in order: the same bits twice, and blocks of unequal strides in the result."""
    monkeypatch.setattr(rows, "multiprocessors", lambda t: 64)
    monkeypatch.setattr(rows, "LEAST", 1)
    g = geometry("2d")
    (x,), (b,) = conv_blocks(device, g, [(2, 3, 11, 13)], dtype)
    xs, bs = [x, x], [b, draw(device, *b.shape, dtype=dtype)]
    found = formed(xs, bs, g)
    assert launches[0][1] > 3
    check("split", found, xs, bs, g, torch.float64 if dtype == torch.float64 else torch.float32)
    again = formed(xs, bs, g)
    assert all(map(torch.equal, found, again))
    weights = grouped(x, b, 1, *walk_of(g))
    assert relative_error(weights, plain_rows(x.double(), b.double(), g)) <= 1e-7


def test_blocks_of_several_dtypes(device: str) -> None:
    g = geometry("2d")
    xs, bs = conv_blocks(device, g, [(2, 1, 5, 4)] * 3, torch.float32)
    xs[1], bs[1], bs[2] = xs[1].bfloat16(), bs[1].bfloat16(), bs[2].double()
    found = formed(xs, bs, g)
    check("dtypes", found, xs, bs, g, torch.float32)


def test_nothing_to_sum(device: str) -> None:
    g = geometry("2d")
    xs, bs = conv_blocks(device, g, [(0, 1, 5, 4), (2, 0, 5, 4), (2, 1, 5, 4)], torch.float32)
    found = formed(xs, bs, g)
    check("empty", found, xs, bs, g, torch.float32)
    assert not found[1].any() and found[1].shape == (2, 72)


def test_what_is_not_served(device: str) -> None:
    whole = torch.ones(1, 1, 1, 3, 3, dtype=torch.int64, device=device)
    walk = ([2, 2], [1, 1], [0, 0], [1, 1])
    assert rows.unordered_rows([whole], [whole[..., :2, :2]], *walk, "highest") is NotImplemented
    four = torch.ones(1, 1, 1, 2, 2, 2, 2, device=device)
    assert rows.grouped_rows(four, four, 1, [1] * 4, [1] * 4, [0] * 4, [1] * 4) is NotImplemented


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's word for infinity times zero
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_row(device: str, value: float) -> None:
    g = geometry("2d")
    (x,), (b,) = conv_blocks(device, g, [(4, 1, 5, 4)], torch.float32)
    b[2, 0, 1, 0, 0] = value
    (found,) = formed([x], [b], g)
    finite = found.isfinite().view(4, 4, -1)
    assert finite[torch.tensor([0, 1, 3])].all()
    assert finite[2].all(1).tolist() == [True, False, True, True]


def test_offsets_beyond_two_to_the_31(device: str, tmp_path: Path) -> None:
    """Rows that far apart are read in place; what lies so within a row is brought together."""
    far = (1 << 31) + 16
    memory, g = (
        sparse(tmp_path, device, far + 4096),
        Geometry((2, 3, 2, 2), (1, 1), (1, 1), (1, 1), False, (0, 0), 1),
    )
    near = conv_blocks(device, g, [(2, 2, 2, 2)], torch.float32)
    for axis in range(5):
        for which in (0, 1):
            sides = [near[0][0], near[1][0]]
            if sides[which].shape[axis] > 2:  # the hole holds one step
                continue
            strides = [1024, 256, 64, 8, 1]
            strides[axis] = far
            sides[which] = memory.as_strided(sides[which].shape, strides).copy_(sides[which])
            found = formed([sides[0]], [sides[1]], g)
            check(f"{axis}, {which}", found, [sides[0]], [sides[1]], g, torch.float32)


# ---- Grams by these rows -------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of the direct route as a GPU runs them."""

    def as_dispatched(*arguments: Any) -> list[Tensor]:
        found: list[Tensor] = rows.unordered_rows(*arguments)
        return unordered_rows.reference(*arguments) if found is NotImplemented else found

    for module in (by_rows, outer_by_rows):
        monkeypatch.setattr(module, "unordered_rows", as_dispatched)
        monkeypatch.setattr(module, "row_gram", whole.row_gram)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("into", [(), (0, 1, 2, 2, 2, 3, -1, 0, 1)])
@pytest.mark.parametrize("buffer", [1, 100, 1 << 20])
def test_direct_grams(
    device: str, into: tuple[int, ...], buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tiles, "buffer", lambda device: buffer)
    g = geometry("2d")
    (x, y), (b, c) = conv_blocks(device, g, [(3, 1, 5, 4), (3, 2, 3, 6)], torch.float64)
    xs, bs = [x, y, x], [b, c, draw(device, *b.shape, dtype=torch.float64)]
    truth = conv_direct.reference(xs, bs, *walk_of(g), "highest", into)
    J = torch.cat([expected(p, q, g, torch.float64) for p, q in zip(xs, bs, strict=True)])
    if into:
        S = torch.zeros(4, 9, dtype=torch.float64, device=device)
        for r, v in enumerate(into):
            S[v, r] = 1.0 if v >= 0 else S[v, r]
        J = S @ J
    assert relative_error(truth, J @ J.T) <= 1e-14
    left, right = [draw(device, 9, 6, 5)], [draw(device, 9, 6, 7)]
    for precision in ("highest", "high"):
        found = outer_direct.reference(left, right, precision, into)
        J = (left[0].double().mT @ right[0].double()).flatten(1)
        J = S @ J if into else J
        assert relative_error(found, J @ J.T) <= 1e-6


# ---- what the launches are -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plans_know_the_architecture(device: str, dtype: torch.dtype) -> None:
    for arch in (80, 90):
        assert plans.form_plan(dtype, "highest", arch, False).sums == torch.float64
        assert plans.form_plan(dtype, "highest", arch, True) is None
    assert plans.form_plan(torch.float32, "highest", 100, False).mode == "ieee"
    assert plans.form_plan(torch.float64, "highest", 89, False) is None
    assert plans.form_plan(torch.float32, "high", 89, True) is None
    assert plans.form_plan(torch.float32, "medium", 90, True).mode == "tf32"
    assert plans.form_plan(torch.bfloat16, "medium", 90, False).sums == torch.float32


@pytest.mark.gpu
def test_the_ops_dispatch_here_and_do_not_synchronise(device: str) -> None:
    g = geometry("2d")
    xs, bs = conv_blocks(device, g, [(2, 1, 5, 4)], torch.float32)
    calls: list[tuple[Any, tuple[Any, ...], Callable[..., Any]]] = [
        (unordered_rows, (xs, bs, *walk_of(g), "highest"), rows.unordered_rows),
        (grouped_rows, (xs[0], bs[0], 1, *walk_of(g)), rows.grouped_rows),
    ]
    for function, arguments, launch in calls:
        torch.library.opcheck(function.overload, arguments)
        assert function.has_kernel("CUDA")
        again = launch(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = function(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for one, other in zip(found, again, strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_compiles_without_spills(device: str) -> None:
    builds = compiled("tests.kernels.specimens:ROWS")
    print(table(builds))
    assert {build.kernel for build in builds} == {"_form", "_add_splits"}
    assert not [build for build in builds if build.spills]
    assert all(build.shared <= SHARED[build.arch] for build in builds)
    formed = [b for b in builds if b.kernel == "_form"]
    halves = [b for b in formed if "bfloat16" in b.specimen]
    assert halves and all(any("bf16" in p or "f16" in p for p in b.products) for b in halves)
