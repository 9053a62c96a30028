"""Rows of convolutions with few channels a group, as dispatched (the kernel, where it is built) and as reference."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast._ops import explicit as module
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops._convolution import Geometry
from mtu_fast._ops.explicit import THIN, conv_rows
from mtu_fast._ops.grouped import grouped_rows
from tests.helpers.tolerance import assert_as_accurate
from tests.helpers.truth import relative_error

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WALKS: dict[str, tuple[tuple[int, ...], ...]] = {  # kernel, stride, padding, dilation, image
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1), (8, 8)),
    "7x7": ((7, 7), (1, 1), (3, 3), (1, 1), (14, 14)),
    "unequal": ((3, 2), (2, 1), (0, 2), (1, 3), (9, 7)),
    "pixels left over": ((2, 2), (3, 3), (0, 0), (1, 1), (10, 9)),
    "dilation and stride": ((3, 3), (2, 3), (2, 3), (2, 2), (11, 12)),
    "kernel beyond the image": ((5, 5), (1, 1), (4, 4), (1, 1), (2, 1)),
    "one tap": ((1, 1), (2, 2), (1, 1), (1, 1), (6, 5)),
    "lines longer than a vector": ((3, 3), (1, 1), (1, 1), (1, 1), (3, 70)),
    "more positions than are summed at once": ((3, 3), (1, 1), (1, 1), (1, 1), (49, 51)),
    "1d": ((5,), (2,), (2,), (1,), (33,)),
    "3d": ((2, 3, 3), (1, 2, 1), (1, 0, 1), (1, 1, 2), (4, 5, 6)),
}  # fmt: skip


def grid(walk: tuple[tuple[int, ...], ...]) -> list[int]:
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for k, s, p, d, n in zip(*walk, strict=True)]


def images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def explicit(
    x: Tensor, b: Tensor, groups: int, kernel: Sequence[int], *walk: Sequence[int]
) -> Tensor:
    """Each row by an ordinary backward through torch's forward."""
    rows = []
    for x_r, b_r in zip(x, b, strict=True):
        w = torch.zeros(
            b.shape[2], x.shape[2] // groups, *kernel, dtype=x.dtype, requires_grad=True
        )
        stride, padding, dilation = walk
        y = torch.ops.aten.convolution(
            x_r, w, None, stride, padding, dilation, False, [0] * len(kernel), groups
        )
        rows.append(torch.autograd.grad(y, w, b_r)[0])
    return torch.stack(rows)


@pytest.fixture(params=[grouped_rows, grouped_rows.reference], ids=["dispatched", "reference"])
def rows_by(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = request.param
    return found


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize(
    ("groups", "inputs", "outputs"), [(5, 5, 5), (3, 3, 9), (2, 6, 4), (1, 3, 4), (2, 34, 2)]
)
def test_rows(
    rows_by: Callable[..., Tensor], name: str, groups: int, inputs: int, outputs: int
) -> None:
    *walk, size = WALKS[name]
    x, b = images(3, 2, inputs, *size), images(3, 2, outputs, *grid(WALKS[name]), seed=1)
    assert relative_error(rows_by(x, b, groups, *walk), explicit(x, b, groups, *walk)) <= 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["3x3", "7x7", "dilation and stride", "more positions than are summed at once"]
)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    *walk, size = WALKS[name]
    x = images(2, 1, 6, *size, dtype=dtype)
    b = images(2, 1, 6, *grid(WALKS[name]), dtype=dtype, seed=1)
    truth, work = explicit(x.double(), b.double(), 6, *walk), working_dtype(x)
    found = grouped_rows(x, b, 6, *walk)
    assert found.dtype == work
    assert_as_accurate(f"{name}, {dtype}", found, explicit(x.to(work), b.to(work), 6, *walk), truth)


@pytest.mark.parametrize(
    ("one", "other", "allowed"),
    [(torch.float32, torch.float64, 1e-14), (torch.bfloat16, torch.float32, 1e-6)],
)
def test_sums_have_the_dtype_of_the_wider_side(
    rows_by: Callable[..., Tensor], one: torch.dtype, other: torch.dtype, allowed: float
) -> None:
    *walk, size = WALKS["3x3"]
    for left, right in ((one, other), (other, one)):
        x, b = images(2, 1, 4, *size, dtype=left), images(2, 1, 4, *size, dtype=right, seed=1)
        found = rows_by(x, b, 4, *walk)
        assert found.dtype == other
        assert relative_error(found, explicit(x.double(), b.double(), 4, *walk)) <= allowed


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: (
        t.flatten(0, 1).contiguous(memory_format=torch.channels_last).view_as(t)
    ),
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "transposed images": lambda t: t.mT.contiguous().mT,
    "one gradient for all positions": lambda t: t[..., :1, :1].expand_as(t),
    "one image for all rows": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["x", "b", "both"])
@pytest.mark.parametrize("stride", [1, 2])
def test_memory_layouts(
    rows_by: Callable[..., Tensor], layout: str, side: str, stride: int
) -> None:
    walk = ((3, 3), (stride, stride), (1, 1), (1, 1))
    x, b = images(4, 1, 6, 8, 6), images(4, 1, 6, *grid((*walk, (8, 6))), seed=1)
    x = LAYOUTS[layout](x) if side != "b" else x
    b = LAYOUTS[layout](b) if side != "x" else b
    truth = explicit(x.contiguous(), b.contiguous(), 3, *walk)
    assert relative_error(rows_by(x, b, 3, *walk), truth) <= 1e-14


@pytest.mark.parametrize("shape", [(0, 1, 4, 6, 6), (2, 0, 4, 6, 6)])
def test_nothing_to_sum(rows_by: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    walk = ((3, 3), (1, 1), (0, 0), (1, 1))
    b = images(*shape[:3], 4, 4)
    found = rows_by(images(*shape), b, 2, *walk)
    assert found.shape == (shape[0], shape[2], shape[2] // 2, 3, 3) and not found.any()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    *walk, size = WALKS["3x3"]
    x, b = (
        images(16, 2, 64, *size, dtype=torch.float32),
        images(16, 2, 64, *size, dtype=torch.float32, seed=1),
    )
    before, expected = torch.get_num_threads(), grouped_rows(x, b, 64, *walk)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(grouped_rows(x, b, 64, *walk), expected)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_row() -> None:
    *walk, size = WALKS["3x3"]
    x, b = images(3, 1, 4, *size), images(3, 1, 4, *size, seed=1)
    x[1, 0, 2, 0, 0], b[1, 0, 1, 3, 3] = torch.inf, torch.nan
    found = grouped_rows(x, b, 4, *walk)
    assert found.isfinite().flatten(1).all(1).tolist() == [True, False, True]
    assert found[1].isfinite().flatten(1).all(1).tolist() == [True, False, False, True]


UNREAD: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[int, int], tuple[int, ...]]] = {
    "between lines": (((1, 1), (2, 1), (0, 0), (1, 1)), (3, 3), (1,)),
    "between pixels": (((1, 1), (1, 2), (0, 0), (1, 1)), (2, 5), (0, 3)),
    "under a dilated kernel": (((2, 2), (1, 1), (0, 0), (2, 2)), (3, 3), (1, 1)),
    "left over": (((2, 2), (2, 2), (0, 0), (1, 1)), (5, 5), (4,)),
}


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("groups", [2, 4])
def test_pixels_that_nobody_reads_may_be_anything(
    rows_by: Callable[..., Tensor], name: str, groups: int
) -> None:
    walk, size, at = UNREAD[name]
    x, b = images(2, 1, 4, *size), images(2, 1, 4, *grid((*walk, size)), seed=1)
    expected = explicit(x, b, groups, *walk)
    x[(..., *at, *[slice(None)] * (2 - len(at)))] = torch.inf
    assert relative_error(rows_by(x, b, groups, *walk), expected) <= 1e-14


# ---- which convolutions they serve ---------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of groups that the op is called with."""
    found: list[int] = []

    def watched(x: Tensor, b: Tensor, groups: int, *walk: Sequence[int]) -> Tensor:
        found.append(groups)
        return grouped_rows(x, b, groups, *walk)

    monkeypatch.setattr(module, "grouped_rows", watched)
    return found


def transposed(weight: tuple[int, ...], groups: int, stride: int = 1, extra: int = 0) -> Geometry:
    return Geometry(weight, (stride,) * 2, (1,) * 2, (2,) * 2, True, (extra,) * 2, groups)


@pytest.mark.parametrize(
    ("g", "served"),
    [
        (transposed((4, 2, 3, 3), 2), [2]),
        (transposed((4, 2, 3, 3), 2, stride=2, extra=1), [2]),
        (transposed((4, 2, 3, 3), 2, stride=1, extra=1), []),  # pixels that no position reaches
        (transposed((4, THIN + 1, 3, 3), 2), []),
    ],
)
def test_transposed(g: Geometry, served: list[int], asked: list[int]) -> None:
    x, w = images(2, 1, 4, 5, 6), torch.zeros(g.weight, dtype=torch.float64, requires_grad=True)
    arguments = (g.stride, g.padding, g.dilation, True, g.output_padding, g.groups)
    y = torch.ops.aten.convolution(x[:, 0], w, None, *arguments)
    b = images(*y.shape, seed=1)
    truth = torch.stack([
        torch.autograd.grad(y[r], w, b[r], retain_graph=True)[0] for r in range(2)
    ])
    assert relative_error(conv_rows(x, b[:, None], g), truth) <= 1e-14
    assert asked == served


@pytest.mark.parametrize(
    ("weight", "groups", "size", "served"),
    [
        ((4, 3, 3, 3), 1, 8, [1]),
        ((4, 3, 3, 3), 1, 400, []),  # a vendor's call is little beside it
        ((4, 1, 3, 3), 4, 400, [4]),
        ((2, THIN + 1, 3, 3), 1, 8, []),
        ((4, 3, 1, 1), 1, 8, []),  # one product for all rows
    ],
)
def test_where_they_pay(
    weight: tuple[int, ...], groups: int, size: int, served: list[int], asked: list[int]
) -> None:
    pad = (weight[-1] // 2,) * 2
    g = Geometry(weight, (1, 1), pad, (1, 1), False, (0, 0), groups)
    x, b = images(2, 2, weight[1] * groups, size, size), images(2, 2, weight[0], size, size, seed=1)
    truth = explicit(x, b, groups, g.kernel, g.stride, g.padding, g.dilation)
    assert relative_error(conv_rows(x, b, g), truth) <= 1e-13
    assert asked == served


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_kernel_stays_within_its_arrays(tmp_path: Path) -> None:
    program, source = tmp_path / "grouped", ROOT / "csrc" / "cpu"
    flags = ["-std=c++17", "-O0", "-Wall", "-fsanitize=address"]
    files = [ROOT / "tests" / "host" / "grouped.cpp", source / "grouped.cpp", source / "walk.cpp"]
    built = subprocess.run(
        ["g++", *flags, *files, "-o", program], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the op --------------------------------------------------------------------------------------

GOOD = (images(2, 1, 4, 6, 6), images(2, 1, 4, 6, 6), 2, [3, 3], [1, 1], [1, 1], [1, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, b, *others = GOOD
    torch.library.opcheck(grouped_rows.overload, (x.to(dtype), b.to(dtype), *others))


@pytest.mark.parametrize(
    ("at", "value", "error", "words"),
    [
        (0, images(2, 1, 4, 6, 6).to(torch.complex64), TypeError, "expected real"),
        (
            1,
            torch.ones(2, 1, 4, 6, 6, dtype=torch.int64),
            TypeError,
            "b is of torch.int64, expected a floating",
        ),
        (0, images(3, 1, 4, 6, 6), ValueError, "the sides of block 0"),
        (1, images(2, 1, 4, 6, 5), ValueError, r"expected \(6, 6\)"),
        (2, 3, ValueError, "groups is 3, expected a divisor of 4 and of 4"),
        (2, 0, ValueError, "groups is 0"),
        (4, [1], ValueError, "one number per axis"),
        (5, [1, -1], ValueError, "one number per axis"),
    ],
)
def test_wrong_arguments(at: int, value: Any, error: type[Exception], words: str) -> None:
    arguments = [*GOOD]
    arguments[at] = value
    with pytest.raises(error, match=words):
        grouped_rows(*arguments)
