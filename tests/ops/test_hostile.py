"""Calls of the ops with whatever numbers, shapes, dtypes and devices: a result that is right, or an error of ours.

Numbers are small, or far beyond what can be counted or held; nothing between that is honest work.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtu_fast._ops import gram as op
from mtu_fast._ops.complementary import complementary
from mtu_fast._ops.gram_schmidt import basis, gram_schmidt, transform
from mtu_fast._ops.grouped import grouped_rows
from mtu_fast._ops.project import project_op
from tests.helpers.truth import relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.int8, torch.bool, torch.complex64]
HUGE = [10**5, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -1, -(2**63)]
# what an allocator, a container or a vendor's library says: such a call got too far
TOO_FAR = ("bad_alloc", "std::vector", "length_error", "allocate", "out of memory", "INTERNAL")

small = st.integers(0, 4)
number = st.one_of(st.integers(0, 3), st.sampled_from(HUGE))


@st.composite
def block(draw: st.DrawFn, *shape: int) -> Tensor:
    """Of this shape, dtype float32 as a rule; rarely of another one, elsewhere, expanded without end, or sparse."""
    shape = tuple(min(max(size, 0), 60) for size in shape)
    kind = draw(st.integers(0, 30))
    dtype = draw(st.sampled_from(DTYPES if kind > 2 else OTHERS)) if kind < 12 else torch.float32
    count = 1
    for size in shape:
        count *= size
    made = (torch.arange(count) * 7 % 5 - 2).to(dtype).view(shape)
    if kind == 3:
        return made.to("meta")
    if kind == 4:
        return made.flatten()
    if kind == 5 and shape:
        at = draw(st.integers(0, len(shape) - 1))
        return made.narrow(at, 0, min(shape[at], 1)).sum(at, keepdim=True).to(dtype).expand(
            *shape[:at], draw(st.sampled_from([2**41, 2**45])), *shape[at + 1 :]
        )  # fmt: skip
    if kind == 6:
        return made.to_sparse()
    if kind == 7:
        return made.transpose(0, -1)
    return made


def blocks(draw: st.DrawFn, many: int, shape: Callable[[], tuple[int, ...]]) -> list[Tensor]:
    return [draw(block(*shape())) for _ in range(many)]


Call = tuple[Any, tuple[Any, ...]]


@st.composite
def of_rows(draw: st.DrawFn) -> Call:
    width = draw(small)
    rows = blocks(draw, draw(st.integers(0, 3)), lambda: (draw(small), width))
    if draw(st.booleans()):
        return op.row_gram, (rows, draw(number))
    others = [draw(block(t.shape[0] if t.dim() else 1, draw(small))) for t in rows]
    return op.rank_one_gram, (rows, others, draw(st.one_of(st.just(1), number)), draw(number))


def pair(draw: st.DrawFn, *axes: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Sides [R, S, A, *] and [R, S, B, *], axes of unequal sizes."""
    widths = draw(small), draw(small)
    left, right = [], []
    for _ in range(draw(st.integers(1, 2))):
        r, s = draw(small), draw(small)
        left.append(draw(block(r, s, widths[0], *(n for n, _ in axes))))
        right.append(draw(block(r, s, widths[1], *(n for _, n in axes))))
    return left, right


@st.composite
def of_positions(draw: st.DrawFn) -> Call:
    left, right = pair(draw)
    which = draw(st.sampled_from(["ghost", "direct", "gather", "both"]))
    precision = draw(st.sampled_from(["highest", "highest", "medium", "best"]))
    if which == "ghost":
        return op.outer_ghost, (left, right, precision)
    if which == "direct":
        return op.outer_direct, (left, right, precision)
    values = [draw(block(draw(small), 2, draw(st.sampled_from(right)).shape[-1])) for _ in left]
    index = [torch.zeros(1, 1).long().expand(*t.shape[:2], *[1] * (2 - t.dim())) for t in values]
    if which == "gather" or left[0].shape[-1] == 0:
        return op.gather_gram, (index, values, precision)
    return op.outer_gather, (left, right, index, values, precision)


@st.composite
def of_images(draw: st.DrawFn) -> Call:
    axes, walk, sizes = draw(st.integers(1, 2)), [], []
    for _ in range(axes):
        n = draw(st.integers(0, 6))
        # kernel, stride, padding, dilation
        step = [draw(st.integers(least, 3)) for least in (1, 1, 0, 1)]
        if draw(st.booleans()):
            step[draw(st.integers(0, 3))] = draw(number)
        room = n + 2 * step[2] - step[3] * (step[0] - 1) - 1
        grid = room // step[1] + 1 if step[1] > 0 and room >= 0 else 0
        walk.append(step)
        sizes.append((n, grid if grid <= 50 else draw(small)))
    x, b = pair(draw, *sizes)
    kernel, stride, padding, dilation = (list(part) for part in zip(*walk, strict=True))
    if draw(st.integers(0, 9)) == 0:
        padding = padding[1:]
    if draw(st.integers(0, 2)) == 0:
        groups = draw(st.one_of(st.integers(0, 3), number))
        return grouped_rows, (x[0], b[0], groups, kernel, stride, padding, dilation)
    op_of = draw(st.sampled_from([op.conv_ghost, op.conv_direct]))
    return op_of, (x, b, kernel, stride, padding, dilation, "highest")


@st.composite
def of_spans(draw: st.DrawFn) -> Call:
    k, widths = draw(small), draw(st.lists(small, max_size=2))
    rows = [draw(block(k, width)) for width in widths]
    which = draw(
        st.sampled_from(["project", "transform", "basis", "gram_schmidt", "complementary"])
    )
    if which == "project":
        m = draw(small)
        return project_op, ([draw(block(m, width)) for width in widths], rows, draw(st.booleans()))
    square = draw(block(k, draw(st.sampled_from([k, k, k, 2]))))
    held = square.is_floating_point() and square.layout == torch.strided and square.numel() < 100
    square = square.double() if held else square
    tol = draw(st.sampled_from([1e-7, 0.5, 0.0, float("nan")]))
    if which == "transform":
        return transform, (rows, square)
    if which == "complementary":
        q = draw(block(draw(small), k))
        wide = held and q.is_floating_point() and q.layout == torch.strided and q.numel() < 100
        return complementary, (square, q.double() if wide else q, draw(st.booleans()))
    if which == "basis":
        matrix = held and square.dim() == 2
        return basis, (square @ square.mT if matrix else square, tol)
    return gram_schmidt, (square, torch.ones(k).double(), torch.ones(k, dtype=torch.bool), tol)


calls = st.one_of(of_rows(), of_positions(), of_images(), of_images(), of_spans())


def tensors(arguments: Any) -> list[Tensor]:
    found = []
    for part in arguments:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, list | tuple):
            found += tensors(part)
    return found


def attempt(function: Any, arguments: tuple[Any, ...]) -> list[Tensor] | None:
    """The results, or None where the call was refused; a RuntimeError is one only of the dispatcher's entry."""
    errors = (TypeError, ValueError) if function.__class__.__name__ == "Op" else (
        TypeError, ValueError, RuntimeError, NotImplementedError,
    )  # fmt: skip
    try:
        found = function(*arguments)
    except errors as error:
        assert not any(word in str(error) for word in TOO_FAR), str(error)
        return None
    return tensors([found])


def check(call: Call) -> None:
    """Called as an op and by the dispatcher alone: refused by both, or the same numbers, those of the reference."""
    function, arguments = call
    found, direct = attempt(function, arguments), attempt(function.overload, arguments)
    assert (found is None) == (direct is None), (function.name, arguments)
    if found is None or direct is None:
        return
    if any(t.is_meta for t in tensors(arguments)):
        assert all(t.is_meta for t in (*tensors(arguments), *found))
        return
    assert all(torch.equal(a, b) for a, b in zip(found, direct, strict=True))
    truth = tensors([function.reference(*arguments)])
    for a, b in zip(found, truth, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        many = function in (basis, complementary, gram_schmidt)  # of these there may be several
        assert many or relative_error(a.double(), b.double()) <= 1e-2


def hostile(examples: int) -> Callable[[], None]:
    checks = list(HealthCheck)
    given_calls = given(calls)(check)
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=checks,
    )(given_calls)  # fmt: skip


def test_a_thousand_calls_on_one_thread(one_thread: None) -> None:
    hostile(1_000)()


def test_a_thousand_calls_on_four_threads() -> None:
    """In a process of their own: a pool of threads is sized once."""
    code = "import torch; torch.set_num_threads(4); from tests.ops.test_hostile import hostile; hostile(1_000)()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


WALKS: dict[str, tuple[tuple[int, int, int, int], int, str]] = {
    # kernel, stride, padding, dilation along both axes of a 4x4 image, and the grid's size
    "stride": ((2, 2**32, 0, 1), 1, "stride"),
    "stride, uncountable": ((2, 2**62, 0, 1), 1, "stride"),
    "kernel": ((2**40, 1, 0, 1), 0, "kernel"),
    "kernel of many taps": ((2**20, 1, 0, 1), 0, "kernel"),
    "padding": ((1, 10**5, 10**5, 1), 3, "padding"),
    "padding, uncountable": ((1, 2**62, 2**62, 1), 2, "stride|padding"),
    "dilation": ((2, 1, 0, 2**40), 0, "dilation"),
}


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("function", [op.conv_ghost, op.conv_direct], ids=lambda f: f.name)
@pytest.mark.parametrize("rows", [0, 2])
def test_walks_that_cannot_be_held_are_refused_by_name(name: str, function: Any, rows: int) -> None:
    walk, grid, words = WALKS[name]
    x, b = torch.ones(rows, 1, 2, 4, 4), torch.ones(rows, 1, 3, grid, grid)
    arguments = ([x], [b], *([number] * 2 for number in walk), "highest")
    with pytest.raises(ValueError, match=words):
        function(*arguments)
    with pytest.raises((ValueError, RuntimeError), match=words):
        function.overload(*arguments)


@pytest.mark.parametrize("stride", [10**5, 2**31 - 1])
def test_a_stride_beyond_the_image_is_one_position(stride: int) -> None:
    x, b = torch.randn(3, 2, 2, 4, 5), torch.randn(3, 2, 3, 1, 1)
    alike = [[3, 3], [2, 3], [0, 0], [1, 1], "highest"]
    far = [[3, 3], [stride, stride], [0, 0], [1, 1], "highest"]
    for function in (op.conv_ghost, op.conv_direct):
        assert torch.equal(function([x], [b], *far), function([x], [b], *alike))
    assert torch.equal(grouped_rows(x, b, 1, *far[:4]), grouped_rows(x, b, 1, *alike[:4]))


REFUSED: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "a block on meta": (
        lambda: torch.ones(2, 3, 4, device="meta"), ValueError, r"left\[1\] is on meta, left\[0\] on cpu",
    ),
    "whole numbers": (lambda: torch.ones(2, 3, 4).long(), TypeError, r"left\[1\] is of torch\.int64"),
    "truths": (lambda: torch.ones(2, 3, 4).bool(), TypeError, r"left\[1\] is of torch\.bool"),
    "sparse": (lambda: torch.ones(2, 3, 4).to_sparse(), TypeError, r"left\[1\] has the layout"),
    "without end": (
        lambda: torch.ones(2, 3, 1).expand(2, 3, 2**45), ValueError, r"left\[1\] has shape .* at most 2\*\*40",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [op.outer_ghost, op.outer_direct], ids=lambda f: f.name)
def test_blocks_that_are_none_are_refused_by_name(name: str, function: Any) -> None:
    make, error, words = REFUSED[name]
    good, other = torch.ones(2, 3, 4), make()
    with pytest.raises(error, match=words):
        function([good, other], [good, good], "highest")
    with pytest.raises((error, RuntimeError)):
        function.overload([good, other], [good, good], "highest")


def test_on_meta_alone_a_call_gives_shapes() -> None:
    t = torch.ones(2, 3, 4, device="meta")
    found = op.outer_ghost([t, t], [t, t], "highest")
    assert found.is_meta and found.shape == (4, 4)
