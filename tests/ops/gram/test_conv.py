"""Grams of convolutions: every route, shared inputs, and the choice of a route."""

from __future__ import annotations

import pytest
import torch

from mtu_fast._ops import _tiles, routes
from mtu_fast._ops import gram as op
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops._prices import CUDA_KERNELS, OF_KERNELS, PLAIN_TORCH
from tests.helpers.truth import relative_error
from tests.ops.gram.blocks import (
    CONVS,
    check,
    conv_blocks,
    conv_truth,
    draw,
    geometry,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("route", ["ghost", "direct"])
@pytest.mark.parametrize("small_tiles", [False, True])
def test_conv_gram(
    name: str, route: str, dtype: torch.dtype, small_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, size = CONVS[name]
    if route == "ghost" and not g.plain:
        # the only route there
        assert op.conv_route(*conv_blocks(g, [(2, 1, size)], dtype), g) == "direct"
        return
    monkeypatch.setattr(op, "conv_route", lambda x, b, geometry, into, precision: route)
    if small_tiles:
        monkeypatch.setattr(_tiles, "TILE", 60)
        monkeypatch.setattr(_tiles, "BUFFER", 60)
    xs, bs = conv_blocks(g, [(3, 1, size), (2, 2, size)], dtype)
    work = working_dtype(xs[0])
    check(
        f"conv {route}, {name}, {dtype}",
        op.conv_gram(xs, bs, g),
        conv_truth(xs, bs, g),
        conv_truth(xs, bs, g, work),
    )


@pytest.mark.parametrize("route", ["ghost", "direct"])
@pytest.mark.parametrize("small_tiles", [False, True])
def test_conv_gram_of_shared_inputs_and_unequal_images(
    route: str, small_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tasks on one forward, two on another with images of another size, and channels-last memory."""
    monkeypatch.setattr(op, "conv_route", lambda x, b, geometry, into, precision: route)
    if small_tiles:
        monkeypatch.setattr(_tiles, "TILE", 60)
    g = geometry((4, 3, 3, 2), padding=1, stride=(2, 1))
    (x, y), (b, c) = conv_blocks(g, [(3, 1, (5, 4)), (2, 2, (3, 6))], torch.float64)
    xs, bs = (
        [x, y, x, y, x],
        [b, c, draw(*b.shape, seed=3), draw(*c.shape, seed=4), draw(*b.shape, seed=5)],
    )
    check(
        f"conv {route}, shared",
        op.conv_gram(xs, bs, g),
        conv_truth(xs, bs, g),
        conv_truth(xs, bs, g),
    )
    last = [t.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for t in xs]
    assert relative_error(op.conv_gram(last, bs, g), op.conv_gram(xs, bs, g)) <= 1e-14


def test_conv_route_prefers_what_is_cheaper() -> None:
    g, tiny = geometry((64, 64, 3, 3), padding=1), [(2, 1, (2, 2))]
    assert op.conv_route(*conv_blocks(g, tiny, torch.float32), g) == "ghost"
    h, large = geometry((4, 3, 3, 3), padding=1), [(2, 1, (40, 40))]
    assert op.conv_route(*conv_blocks(h, large, torch.float32), h) == "direct"


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_without_a_kernel_plain_torch_is_charged(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op.outer_ghost, "why_no_kernel", lambda device: "none was built")
    assert op.prices(torch.device(device)) == PLAIN_TORCH
    monkeypatch.setattr(op.outer_ghost, "why_no_kernel", lambda device: "")
    if device in OF_KERNELS:
        assert op.prices(torch.device(device)) == OF_KERNELS[device]


def test_on_a_gpu_patches_are_charged_for_each_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    """784 positions: products of 49-tap patches cost five times those of nine taps, and more than the rows."""
    monkeypatch.setattr(routes, "prices", lambda device: CUDA_KERNELS)
    for kernel, route in ((3, "ghost"), (7, "direct")):
        g = geometry((64, 64, kernel, kernel), padding=kernel // 2)
        assert op.conv_route(*conv_blocks(g, [(16, 1, (7, 7))], torch.float32), g) == route


def test_on_a_gpu_products_of_half_precision_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows and of positions alike: what is left are launches, and rows that are written."""
    monkeypatch.setattr(routes, "prices", lambda device: CUDA_KERNELS)
    g = geometry((64, 64, 3, 3), padding=1)
    costs = [
        op.conv_cost(*conv_blocks(g, [(8, 1, (40, 40))], dtype), g)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert costs[1].combine == costs[0].combine * CUDA_KERNELS.half
    assert all(half < whole for whole, half in zip(*costs, strict=True))
    left, right = torch.ones(4, 64, 32), torch.ones(4, 64, 48)
    whole, half = op.outer_cost([left], [right]), op.outer_cost([left.half()], [right.half()])
    assert all(b < a for a, b in zip(whole, half, strict=True))


def test_costs_know_what_precision_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 takes less on a GPU, and decides between routes; float64 and half precision have prices of their own."""
    g = geometry((64, 64, 3, 3), padding=1)
    blocks = {dtype: conv_blocks(g, [(8, 1, (40, 40))], dtype) for dtype in DTYPES}

    def costs(dtype: torch.dtype) -> list[float]:
        ways = ("highest", "high", "medium")
        return [op.conv_cost(*blocks[dtype], g, (), each).direct for each in ways]

    for dtype in DTYPES:
        assert len(set(costs(dtype))) == 1  # no kernel of the CPU rounds
    left, right = torch.ones(16, 100, 768), torch.ones(16, 100, 768)
    assert op.outer_route([left], [right], (), "medium") == op.outer_route([left], [right])
    monkeypatch.setattr(routes, "prices", lambda device: CUDA_KERNELS)
    highest, high, medium = costs(torch.float32)
    assert medium < high < highest
    assert all(len(set(costs(dtype))) == 1 for dtype in DTYPES if dtype != torch.float32)
    found = [op.outer_route([left], [right], (), each) for each in ("highest", "medium")]
    assert found == ["direct", "ghost"]


@pytest.mark.skipif(not op.conv_ghost.has_kernel("CPU"), reason="the kernel's own rule")
def test_images_that_the_kernel_cuts_go_direct() -> None:
    dilated = geometry((64, 256, 3, 3), padding=6, dilation=6)
    for size, route in (((16, 16), "ghost"), ((17, 17), "direct")):
        assert op.conv_route(*conv_blocks(dilated, [(1, 1, size)], torch.float32), dilated) == route
