"""The Gram kernels, in Triton's interpreter or on the GPU, against float64 truth under the one tolerance rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtu_fast._ops import gram as op
from mtu_fast._ops._convolution import Geometry, plain_rows
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.truth import relative_error

pytest.importorskip("triton", reason="needs Triton")

from mtu_fast.kernels import blocks as kernel_blocks
from mtu_fast.kernels import gram as kernels
from mtu_fast.kernels import plans
from tests.helpers.triton import compiled, table

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# TF32 keeps 10 bits, bfloat16 7
ROUNDS = {"highest": torch.float32, "high": torch.float32, "medium": torch.bfloat16}
Blocks = list[Tensor]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("device", DEVICES)]


def draw(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def explicit(rows: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    J = torch.cat([t.to(dtype).flatten(1) for t in rows])
    return J @ J.T


def check(
    name: str, found: Tensor, rows: Callable[[torch.dtype], Blocks], precision: torch.dtype
) -> None:
    """`rows(dtype)` are the explicit rows, computed in that dtype; `precision` is what plain torch works in."""
    truth = explicit(rows(torch.float64))
    plain = explicit(rows(precision), precision)
    assert found.dtype == torch.float64 and found.device == truth.device
    assert torch.equal(found, found.T)
    assert_as_accurate(name, found, plain, truth)


# ---- explicit rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[1], [3, 14], [30, 0, 3], [70]])
def test_row_gram(device: str, dtype: torch.dtype, counts: list[int]) -> None:
    """Float64 sums whatever the dtype: as exact as one float64 product."""
    rows = [draw(device, r, 333, dtype=dtype) for r in counts]
    check(
        f"row_gram {counts} {dtype}",
        kernels.row_gram(rows),
        lambda to: [t.to(to) for t in rows],
        torch.float64,
    )


@pytest.mark.parametrize("counts", [[9], [20, 13], [70, 80]])
@pytest.mark.parametrize("part", [0.2, 0.6, 1.0])
def test_row_gram_leaves_out_what_is_known(device: str, counts: list[int], part: float) -> None:
    rows = [draw(device, r, 77).round() for r in counts]
    fresh = sum(counts) - round(part * sum(counts))
    expected = explicit(rows)
    expected[fresh:, fresh:] = 0
    assert torch.equal(kernels.row_gram(rows, sum(counts) - fresh), expected)


def test_row_gram_of_other_dtypes_strides_and_many_blocks(device: str) -> None:
    rows = [
        draw(device, 3, 40, dtype=torch.bfloat16), draw(device, 2, 40), draw(device, 1, 40, dtype=torch.float16),
        draw(device, 40, 3).T, draw(device, 2, 80)[:, ::2], draw(device, 1, 40).expand(3, 40),
        draw(device, 1, 1).expand(2, 40),
    ]  # fmt: skip
    check("views", kernels.row_gram(rows), lambda to: [t.to(to) for t in rows], torch.float64)
    many = [draw(device, 1, 50) for _ in range(kernel_blocks.MANY + 1)]
    check("many", kernels.row_gram(many), lambda to: [t.to(to) for t in many], torch.float64)
    columns = [draw(device, 40, 5).T, draw(device, 40, 5).T]
    check(
        "columns", kernels.row_gram(columns), lambda to: [t.to(to) for t in columns], torch.float64
    )


def test_row_gram_of_nothing(device: str) -> None:
    assert kernels.row_gram([draw(device, 0, 5)]).shape == (0, 0)
    assert torch.equal(
        kernels.row_gram([draw(device, 3, 0)]),
        torch.zeros(3, 3, dtype=torch.float64, device=device),
    )
    assert kernels.row_gram([torch.ones(2, 3, dtype=torch.int64, device=device)]) is NotImplemented


def test_row_gram_keeps_what_is_not_finite_in_its_row(device: str) -> None:
    rows = draw(device, 5, 70)
    rows[3, 69] = float("nan")
    found = kernels.row_gram([rows])
    assert found[3].isnan().all() and found.isnan().sum() == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_gram_without_fast_float64(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of float32 products, sums in float64: the error of a short float32 sum, however long the rows."""
    monkeypatch.setattr(plans, "FAST_FLOAT64", ())
    rows = [draw(device, 6, 3_000, dtype=dtype)]
    found = kernels.row_gram(rows)
    check("float32 blocks", found, lambda to: [t.to(to) for t in rows], torch.float32)
    assert relative_error(found, explicit(rows)) <= 8 * torch.finfo(torch.float32).eps


# ---- outer products ------------------------------------------------------------------------------


def outer_rows(left: Blocks, right: Blocks) -> Callable[[torch.dtype], Blocks]:
    return lambda to: [
        (x.to(to).mT @ y.to(to)).flatten(1) for x, y in zip(left, right, strict=True)
    ]


def lefts(device: str, kind: str, dtype: torch.dtype) -> Blocks:
    """Left sides [R, S, 5]."""
    if kind == "one":
        return [draw(device, 3, 6, 5, dtype=dtype)]
    a, c = draw(device, 3, 10, 5, dtype=dtype), draw(device, 2, 33, 5, dtype=dtype)
    if kind == "unequal":
        return [a, c, draw(device, 4, 1, 5, dtype=dtype), draw(device, 2, 0, 5, dtype=dtype)]
    assert kind == "three tasks"
    return [a, c, a, a]


@pytest.mark.parametrize("kind", ["one", "three tasks"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_ghost(device: str, dtype: torch.dtype, kind: str) -> None:
    left = lefts(device, kind, dtype)
    right = [draw(device, *t.shape[:2], 19, dtype=dtype) for t in left]
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    check(
        f"{kind} {dtype}",
        kernels.outer_ghost(left, right, "highest"),
        outer_rows(left, right),
        precision,
    )
    if kind == "three tasks" and dtype == torch.float32:
        check(
            "right shared",
            kernels.outer_ghost(right, left, "highest"),
            outer_rows(right, left),
            torch.float64,
        )


@pytest.mark.parametrize("precision", ROUNDS)
def test_outer_ghost_of_unequal_forwards(device: str, precision: str) -> None:
    left = lefts(device, "unequal", torch.float32)
    right = [draw(device, *t.shape[:2], 7) for t in left]
    check(
        precision,
        kernels.outer_ghost(left, right, precision),
        outer_rows(left, right),
        ROUNDS[precision],
    )


def test_outer_ghost_of_views_and_mixed_dtypes(device: str) -> None:
    left = [
        draw(device, 4, 3, 5).transpose(0, 1),
        draw(device, 1, 3, 5).expand(2, 3, 5),
        draw(device, 2, 70, 10)[..., ::2],
    ]
    right = [
        draw(device, 3, 7, 4).mT, draw(device, 2, 3, 14)[..., ::2], draw(device, 2, 70, 7, dtype=torch.bfloat16),
    ]  # fmt: skip
    check(
        "views", kernels.outer_ghost(left, right, "highest"), outer_rows(left, right), torch.float64
    )
    a = draw(device, 2, 6, 5)
    right = [draw(device, 2, 6, 7), draw(device, 2, 7, 6).mT]
    check(
        "strides of two tasks",
        kernels.outer_ghost([a, a], right, "highest"),
        outer_rows([a, a], right),
        torch.float64,
    )


def test_outer_ghost_of_more_tasks_than_a_launch_takes(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_blocks, "MANY", 2)
    left = [draw(device, 2, 5, 3)] * 5
    right = [draw(device, 2, 5, 4) for _ in left]
    check(
        "five tasks",
        kernels.outer_ghost(left, right, "highest"),
        outer_rows(left, right),
        torch.float64,
    )


def test_outer_ghost_of_duplicates_and_zeros(device: str) -> None:
    a, b = draw(device, 2, 3, 5), draw(device, 2, 3, 7)
    left, right = [torch.cat([a, a, 0 * a])], [torch.cat([b, b, b])]
    found = kernels.outer_ghost(left, right, "highest")
    assert relative_error(found[:2], found[2:4]) <= 1e-15 and not found[4:].any()
    check("duplicates", found, outer_rows(left, right), torch.float64)


def test_outer_ghost_of_nothing(device: str) -> None:
    for shape, width in (((3, 0, 5), 3), ((0, 4, 5), 0), ((3, 4, 0), 3)):
        found = kernels.outer_ghost(
            [draw(device, *shape)], [draw(device, *shape[:2], 7)], "highest"
        )
        assert found.shape == (width, width) and not found.any()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's word for infinity times zero
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outer_ghost_shows_what_is_not_finite(device: str, value: float) -> None:
    left, right = draw(device, 4, 5, 3), draw(device, 4, 5, 3)
    left[2, 4, 0] = value
    found = kernels.outer_ghost([left], [right], "highest")
    others = torch.tensor([0, 1, 3], device=device)
    assert not found[2].isfinite().any() and found[others][:, others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plans_know_the_architecture(device: str, dtype: torch.dtype) -> None:
    for arch in (80, 90):
        assert plans.ghost_plan(dtype, "highest", arch).sums == torch.float64
        assert plans.row_plan(dtype, 9, arch).sums == torch.float64
    for arch in (86, 89, 120):
        assert plans.ghost_plan(torch.float32, "highest", arch).mode == "ieee"
        assert plans.row_plan(torch.float32, 9, arch).sums == torch.float32
    assert plans.ghost_plan(torch.float32, "high", 90).mode == "tf32x3"
    assert plans.ghost_plan(torch.float32, "medium", 90).mode == "tf32"


# ---- convolutions --------------------------------------------------------------------------------

CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {  # weight, image, walk
    "1d": ((4, 3, 3), (9,), {"stride": [2], "padding": [2], "dilation": [2]}),
    "2d": ((4, 3, 3, 2), (6, 5), {"stride": [1, 2], "padding": [1, 2], "dilation": [2, 1]}),
    "2d, pointwise": ((5, 3, 1, 1), (3, 5), {}),
    "2d, kernel beyond the image": ((2, 3, 5, 5), (2, 3), {"padding": [2, 2]}),
    "3d": (
        (4, 2, 2, 3, 2),
        (3, 4, 3),
        {"stride": [1, 2, 1], "padding": [0, 1, 1], "dilation": [1, 1, 2]},
    ),
}


def geometry(name: str) -> Geometry:
    weight, image, walk = CONVS[name]
    d = len(image)
    one, zero = [1] * d, (0,) * d
    stride, padding, dilation = (
        walk.get("stride", one),
        walk.get("padding", zero),
        walk.get("dilation", one),
    )
    return Geometry(weight, tuple(stride), tuple(padding), tuple(dilation), False, zero, 1)


def conv_blocks(
    device: str, g: Geometry, sizes: list[tuple[int, ...]], dtype: torch.dtype
) -> tuple[Blocks, Blocks]:
    """x [R, F, C, *] and b [R, F, O, *] for sizes (R, F, *image)."""
    xs, bs = [], []
    for r, f, *image in sizes:
        xs.append(draw(device, r, f, g.weight[1], *image, dtype=dtype))
        y = torch.ops.aten.convolution(
            torch.zeros(f, g.weight[1], *image), torch.zeros(g.weight), None, g.stride, g.padding, g.dilation, False,
            g.output_padding, 1,
        )  # fmt: skip
        bs.append(draw(device, r, *y.shape, dtype=dtype))
    return xs, bs


def conv_rows(xs: Blocks, bs: Blocks, g: Geometry) -> Callable[[torch.dtype], Blocks]:
    return lambda to: [plain_rows(x.to(to), b.to(to), g) for x, b in zip(xs, bs, strict=True)]


def conv_ghost(xs: Blocks, bs: Blocks, g: Geometry, precision: str = "highest") -> Tensor:
    kernel, stride, padding, dilation = map(list, (g.kernel, g.stride, g.padding, g.dilation))
    found: Tensor = kernels.conv_ghost(xs, bs, kernel, stride, padding, dilation, precision)
    return found


@pytest.mark.parametrize("name", CONVS)
def test_conv_ghost(device: str, name: str) -> None:
    g, image = geometry(name), CONVS[name][1]
    xs, bs = conv_blocks(device, g, [(3, 1, *image), (1, 2, *image)], torch.float32)
    check(f"conv {name}", conv_ghost(xs, bs, g), conv_rows(xs, bs, g), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conv_ghost_of_tasks_images_and_layouts(device: str, dtype: torch.dtype) -> None:
    g = geometry("2d")
    (x, y), (b, c) = conv_blocks(device, g, [(2, 1, 5, 4), (1, 2, 3, 6)], dtype)
    xs, bs = [x, y, x], [b, c, draw(device, *b.shape, dtype=dtype)]
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    found = conv_ghost(xs, bs, g)
    check(f"shared {dtype}", found, conv_rows(xs, bs, g), precision)
    last = [t.movedim(2, -1).contiguous().movedim(-1, 2) for t in xs]
    check(f"channels last {dtype}", conv_ghost(last, bs, g), conv_rows(xs, bs, g), precision)


# ---- table look-ups ------------------------------------------------------------------------------


def gather_rows(index: Blocks, values: Blocks, size: int) -> Callable[[torch.dtype], Blocks]:
    return lambda to: [
        torch.einsum("rsv,rsd->rvd", F.one_hot(i.long(), size).to(to), v.to(to)).flatten(1)
        for i, v in zip(index, values, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_gram(device: str, dtype: torch.dtype) -> None:
    """Indices repeat within a row, across rows and across blocks; two tasks share theirs."""
    index = [torch.randint(0, 7, size).to(device) for size in ((3, 5), (2, 35), (2, 0))]
    index.append(index[0])
    values = [draw(device, *i.shape, 4, dtype=dtype) for i in index]
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    check(
        f"gather {dtype}",
        kernels.gather_gram(index, values),
        gather_rows(index, values, 7),
        precision,
    )


def test_gather_gram_where_nothing_matches(device: str) -> None:
    index = torch.arange(6).view(2, 3).to(device) * 10**10
    values = draw(device, 2, 3, 4)
    values[1, 2, 3] = float("nan")  # meets itself alone
    found = kernels.gather_gram([index], [values])
    assert found[1, 1].isnan() and found[0, 1] == 0 and found[0, 0].isfinite()
    assert kernels.gather_gram([index.double()], [values]) is NotImplemented


# ---- all of them ---------------------------------------------------------------------------------


def calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op, by its name."""
    g = geometry("2d")
    xs, bs = conv_blocks(device, g, [(2, 1, 4, 4)], torch.float32)
    walk = [list(part) for part in (g.kernel, g.stride, g.padding, g.dilation)]
    index = torch.randint(0, 3, (2, 3)).to(device)
    left = lefts(device, "three tasks", torch.float32)
    return {
        "row_gram": ([draw(device, 3, 400), draw(device, 20, 400)],),
        "outer_ghost": (left, [draw(device, *t.shape[:2], 7) for t in left], "highest"),
        "conv_ghost": (xs, bs, *walk, "highest"),
        "gather_gram": ([index, index], [draw(device, 2, 3, 4), draw(device, 2, 3, 4)], "highest"),
    }


@pytest.mark.parametrize("name", ["row_gram", "outer_ghost", "conv_ghost", "gather_gram"])
def test_the_same_bits_twice(device: str, name: str) -> None:
    arguments, launch = calls(device)[name], getattr(kernels, name)
    assert torch.equal(launch(*arguments), launch(*arguments))


def sparse(tmp_path: Path, device: str, elements: int) -> Tensor:
    """Float32 memory that is not there until written: a file with a hole, or the GPU's."""
    if device == "cuda":
        return torch.zeros(elements, device=device)
    path = tmp_path / "hole"
    with path.open("wb") as file:
        file.truncate(4 * elements)
    return torch.from_file(str(path), shared=True, size=elements)


def test_offsets_beyond_two_to_the_31(device: str, tmp_path: Path) -> None:
    """Rows, positions and features lie further apart than 32-bit offsets reach."""
    far = (1 << 31) + 16
    memory = sparse(tmp_path, device, far + 64)

    def apart(axis: int, *shape: int) -> Tensor:
        strides = [8, 4, 1]
        strides[axis] = far
        view = memory.as_strided(shape, strides[: len(shape)])
        return view.copy_(draw(device, *shape))

    rows = apart(0, 2, 5)
    check("rows apart", kernels.row_gram([rows]), lambda to: [rows.to(to)], torch.float64)
    rows = apart(1, 3, 2)
    check("columns apart", kernels.row_gram([rows]), lambda to: [rows.to(to)], torch.float64)
    for axis in range(3):
        left, right = apart(axis, 2, 2, 2), draw(device, 2, 2, 3)
        check(
            f"axis {axis}",
            kernels.outer_ghost([left], [right], "highest"),
            outer_rows([left], [right]),
            torch.float64,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["row_gram", "outer_ghost", "conv_ghost", "gather_gram"])
def test_the_ops_dispatch_here_and_do_not_synchronise(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, function = calls(device)[name], getattr(op, name)
    torch.library.opcheck(function.overload, arguments)
    assert function.has_kernel("CUDA")
    expected = function(*arguments)
    assert relative_error(expected, function.reference(*arguments)) <= 1e-6

    def refused(*_: object) -> Tensor:
        raise AssertionError("the reference served")

    monkeypatch.setattr(function, "reference", refused)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = function(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)


def test_compiles_without_spills(device: str) -> None:
    builds = compiled("tests.kernels.specimens:GRAM")
    print(table(builds))
    assert {build.kernel for build in builds} == {"_row_gram", "_add_splits", "_ghost", "_collect"}
    assert not [build for build in builds if build.spills]
    wide = [b for b in builds if b.specimen.endswith("float32 highest") and b.kernel == "_ghost"]
    assert wide and all(
        any("f64" in product for product in b.products if product.startswith("mma")) for b in wide
    )
