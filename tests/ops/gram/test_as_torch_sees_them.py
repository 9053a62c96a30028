"""The ops as torch sees them, what they refuse, and how exact they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast._ops import gram as op
from tests.helpers.truth import relative_error
from tests.ops.gram.blocks import (
    CONVS,
    conv_blocks,
    draw,
    geometry,
    met_blocks,
    outer_blocks,
)

# ---- the ops as torch sees them ------------------------------------------------------------------


def conv_arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    g, size = CONVS[name]
    xs, bs = conv_blocks(g, [(3, 1, size), (2, 2, size)], dtype)
    return xs, bs, list(g.kernel), list(g.stride), list(g.padding), list(g.dilation), "highest"


CALLS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "row_gram": lambda: (op.row_gram, ([draw(3, 7), draw(2, 7)],)),
    "rank_one_gram": lambda: (
        op.rank_one_gram,
        ([draw(3, 7), draw(3, 2)], [draw(3, 5), draw(3, 1)], 2),
    ),
    "outer_direct": lambda: (op.outer_direct, (*outer_blocks("unequal", torch.float64), "highest")),
    "conv_direct": lambda: (op.conv_direct, conv_arguments("2d", torch.float64)),
    "outer_ghost": lambda: (op.outer_ghost, (*outer_blocks("unequal", torch.float32), "highest")),
    "outer_ghost, shared": lambda: (
        op.outer_ghost,
        (*outer_blocks("left shared", torch.bfloat16), "highest"),
    ),
    "conv_ghost": lambda: (op.conv_ghost, conv_arguments("2d")),
    "gather_gram": lambda: (op.gather_gram, ([torch.randint(0, 7, (3, 5))], [draw(3, 5, 4)])),
    "outer_gather": lambda: (op.outer_gather, met_blocks("unequal", torch.float32)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    function, arguments = CALLS[name]()
    torch.library.opcheck(function.overload, arguments)
    assert relative_error(function(*arguments), function.reference(*arguments)) <= 1e-14


@pytest.mark.parametrize("name", CALLS)
def test_ops_change_nothing_they_are_given(name: str) -> None:
    function, arguments = CALLS[name]()
    tensors = [
        t for part in arguments if isinstance(part, list) for t in part if isinstance(t, Tensor)
    ]
    before = [(t.clone(), t._version) for t in tensors]
    function(*arguments)
    assert all(
        torch.equal(t, old) and t._version == version
        for t, (old, version) in zip(tensors, before, strict=True)
    )


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_twice(name: str) -> None:
    function, arguments = CALLS[name]()
    assert torch.equal(function(*arguments), function(*arguments))


# ---- arguments -----------------------------------------------------------------------------------

ROUTES: dict[str, Callable[[Tensor, str], Tensor]] = {
    "row_gram": lambda t, precision: op.row_gram([t[:, 0]]),
    "rank_one_gram": lambda t, precision: op.rank_one_gram([t[:, 0]], [t[:, 0].abs()], 1),
    "outer_gram, rank one": lambda t, precision: op.outer_gram([t[:, :1]], [t[:, :1].abs()], precision),
    "outer_gram": lambda t, precision: op.outer_gram([t.abs()], [t], precision),
    "outer_direct": lambda t, precision: op.outer_direct([t], [t], precision),
    "outer_ghost": lambda t, precision: op.outer_ghost([t], [t], precision),
    "conv_gram": lambda t, precision: op.conv_gram(
        [t[:, None, :, :, None]], [t[:, None, :1, :, None].abs()],
        geometry((1, 3, 1, 1)), precision,
    ),
    "conv_direct": lambda t, precision: op.conv_direct(
        [t[..., None].abs()], [t[..., None]], [1], [1], [0], [1], precision=precision
    ),
    "conv_ghost": lambda t, precision: op.conv_ghost(
        [t[..., None].abs()], [t[..., None]], [1], [1], [0], [1], precision=precision
    ),
    "gather_gram": lambda t, precision: op.gather_gram([torch.zeros(t.shape[:2]).long()], [t], precision=precision),
    "outer_gather": lambda t, precision: op.outer_gather(
        [t.abs()], [t], [torch.zeros(t.shape[:2]).long()], [t], precision
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTES)
def test_complex_blocks_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"block of torch\.complex128, expected real ones"):
        ROUTES[name](torch.randn(2, 3, 5, dtype=torch.complex128), "highest")


@pytest.mark.parametrize(
    "name", [name for name in ROUTES if name not in ("row_gram", "rank_one_gram")]
)
def test_an_unknown_precision_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"precision: found 'fast', expected one of 'highest', 'high', 'medium'"
    ):
        ROUTES[name](torch.randn(2, 3, 5), "fast")


WRONG: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sides in number": (lambda: op.outer_ghost([draw(2, 3, 4)], [], "highest"), "found 1 blocks on one side and 0"),
    "positions": (lambda: op.outer_gram([draw(2, 1, 4)], [draw(2, 3, 4)]), r"block 0 .* \(2, 1, 4\) and \(2, 3"),
    "rows": (lambda: op.outer_ghost([draw(2, 3, 4)], [draw(3, 3, 4)], "highest"), "expected the same rows"),
    "widths": (
        lambda: op.outer_ghost([draw(2, 3, 4), draw(2, 3, 5)], [draw(2, 3, 4)] * 2, "highest"),
        r"block 1 has shape \(2, 3, 5\), the first one \(2, 3, 4\)",
    ),
    "axes": (lambda: op.outer_ghost([draw(2, 3)], [draw(2, 3)], "highest"), r"expected \[rows, positions, width"),
    "grid": (
        lambda: op.conv_ghost([draw(1, 1, 2, 4, 4)], [draw(1, 1, 2, 9, 9)], [3, 3], [1, 1], [1, 1], [1, 1], "highest"),
        r"gradients of \(9, 9\), expected \(4, 4\)",
    ),
    "stride": (
        lambda: op.conv_ghost([draw(1, 1, 2, 4)], [draw(1, 1, 2, 4)], [1], [0], [0], [1], "highest"), "only padding",
    ),
    "axes of the kernel": (
        lambda: op.conv_ghost([draw(1, 1, 2, 4)], [draw(1, 1, 2, 4)], [1, 1], [1], [0], [1], "highest"), "one number",
    ),
    "conv, rows": (
        lambda: op.conv_gram([draw(2, 1, 2, 4)], [draw(1, 1, 2, 4)], geometry((2, 2, 1), padding=0)), "the same rows",
    ),
    "values": (
        lambda: op.gather_gram([torch.zeros(2, 3).long()], [draw(2, 3)]), r"values \(2, 3\), expected \[rows, posi",
    ),
    "width of the table": (
        lambda: op.outer_gather([draw(2, 3, 4)], [draw(2, 3, 5)], [torch.zeros(2, 3).long()], [draw(2, 3, 4)]),
        r"right sides have shape \(2, 3, 5\) and the values \(2, 3, 4\), expected one width",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_blocks_that_do_not_fit_are_refused(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_index_of_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"index of torch\.float64, expected whole numbers"):
        op.gather_gram([draw(2, 3)], [draw(2, 3, 4)])


# ---- how exact -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "dtype", "precision", "expected"),
    [
        ((8, 0), torch.float32, "highest", False),
        ((9, 0), torch.float32, "highest", False),
        ((8, 9), torch.float32, "highest", True),  # no fast float64: blocks of float32 products
        ((9, 0), torch.float32, "high", True),
        ((9, 0), torch.float32, "medium", True),
        ((9, 0), torch.bfloat16, "highest", True),
        ((9, 0), torch.float64, "medium", False),
        ((8, 9), torch.float64, "highest", False),
    ],
)
def test_grams_are_inexact_where_the_kernels_sum_float32(
    arch: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr(op.outer_ghost, "why_no_kernel", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: arch)
    assert op.inexact(torch.device("cuda"), dtype, precision) is expected
    assert not op.inexact(torch.device("cpu"), dtype, precision)
    monkeypatch.setattr(op.outer_ghost, "why_no_kernel", lambda device: "Triton does not work here")
    assert not op.inexact(torch.device("cuda"), dtype, precision)  # plain torch, in float64
