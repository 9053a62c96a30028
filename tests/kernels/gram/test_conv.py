"""`conv_ghost` in Triton: convolutions by positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtu_fast._ops._convolution import Geometry, plain_rows

pytest.importorskip("triton", reason="needs Triton")
from mtu_fast.kernels import gram as kernels
from tests.kernels.gram.blocks import CONVS, DEVICES, Blocks, check, conv_blocks, draw, geometry

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("device", DEVICES)]


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
