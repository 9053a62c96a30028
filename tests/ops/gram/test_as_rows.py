"""Factors as explicit rows, and single gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mtu_fast._ops import _tiles
from mtu_fast._ops import explicit as rows_of
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops._convolution import conv_weight_gradient, patch_rows
from mtu_fast._ops.unordered_rows import unordered_rows
from tests.helpers.truth import relative_error
from tests.ops.gram.blocks import (
    CONVS,
    conv_blocks,
    conv_truth,
    draw,
    gather_truth,
    geometry,
    outer_blocks,
    outer_truth,
)

# ---- rows and single gradients -------------------------------------------------------------------


def test_outer_rows() -> None:
    left, right = outer_blocks("one block", torch.float64)
    assert (
        relative_error(rows_of.outer_rows(left[0], right[0]), outer_truth(left, right)[0]) <= 1e-15
    )


@pytest.mark.parametrize("name", CONVS)
def test_conv_rows(name: str) -> None:
    g, size = CONVS[name]
    xs, bs = conv_blocks(g, [(3, 2, size)], torch.float64)
    truth = conv_truth(xs, bs, g)[0]
    assert relative_error(rows_of.conv_rows(xs[0], bs[0], g), truth) <= 1e-14
    summed = conv_weight_gradient(xs[0].flatten(0, 1), bs[0].flatten(0, 1), g)
    assert relative_error(summed, truth.sum(0)) <= 1e-14


@pytest.mark.parametrize("buffer", [1, 1 << 22])
@pytest.mark.parametrize("name", CONVS)
def test_rows_from_patches(name: str, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What forms rows on a GPU without Triton: some rows at a time, or all."""
    monkeypatch.setattr(_tiles, "BUFFER", buffer)
    g, size = CONVS[name]
    xs, bs = conv_blocks(g, [(3, 2, size)], torch.float64)
    truth = conv_truth(xs, bs, g)[0]
    assert relative_error(patch_rows(xs[0], bs[0], g), truth) <= 1e-14
    # channels-last memory
    x, b = (t.movedim(2, -1).contiguous().movedim(-1, 2) for t in (xs[0], bs[0]))
    assert relative_error(patch_rows(x, b, g), truth) <= 1e-14


def test_gather_rows() -> None:
    index, values = torch.tensor([[1, 1, 0], [3, 2, 3]]), draw(2, 3, 4)
    assert (
        relative_error(rows_of.gather_rows(index, values, 5), gather_truth([index], [values], 5)[0])
        <= 1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unordered_rows(dtype: torch.dtype) -> None:
    """Of every block, as an op: columns in one order, so that the Gram is that of the rows."""
    g = geometry((4, 3, 3, 2), padding=1)
    xs, bs = conv_blocks(g, [(2, 1, (5, 4)), (1, 2, (3, 6))], dtype)
    walk = (list(g.kernel), list(g.stride), list(g.padding), list(g.dilation))
    found = unordered_rows(xs, bs, *walk, "highest")
    assert [t.shape for t in found] == [(2, 72), (1, 72)]
    assert {t.dtype for t in found} == {working_dtype(xs[0])}
    J, truth = (
        torch.cat(found).double(),
        torch.cat([
            rows_of.conv_rows(x.double(), b.double(), g).flatten(1)
            for x, b in zip(xs, bs, strict=True)
        ]),
    )
    assert relative_error(J @ J.T, truth @ truth.T) <= (1e-14 if dtype == torch.float64 else 1e-6)
    torch.library.opcheck(unordered_rows.overload, (xs, bs, *walk, "highest"))


def test_half_precision_is_not_widened_for_a_gpu() -> None:
    """Its tensor cores read it, and sum in float32: seen on tensors without memory."""
    with FakeTensorMode():
        left = torch.empty(2, 3, 4, device="cuda", dtype=torch.bfloat16)
        right = torch.empty(2, 3, 5, device="cuda", dtype=torch.bfloat16)
        with Ops() as seen:
            found = rows_of.outer_rows(left, right)
            mixed = rows_of.outer_rows(left, right.float())
        assert found.dtype == mixed.dtype == torch.float32 and found.shape == (2, 4, 5)
        called = [name for name in seen.names if "bmm" in name]
        assert called == ["aten::bmm.dtype", "aten::bmm"]


class Ops(TorchDispatchMode):
    """The ops that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))
