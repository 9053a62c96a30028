"""Factors as explicit rows, and single gradients."""

from __future__ import annotations

import pytest
import torch

from mtu_fast._ops import _tiles
from mtu_fast._ops import explicit as rows_of
from mtu_fast._ops._convolution import conv_weight_gradient, patch_rows
from tests.helpers.truth import relative_error
from tests.ops.gram.blocks import (
    CONVS,
    conv_blocks,
    conv_truth,
    draw,
    gather_truth,
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
    """What forms rows on a GPU: some rows at a time, or all."""
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
