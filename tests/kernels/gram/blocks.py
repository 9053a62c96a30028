"""Blocks of the tests of Gram kernels, and what their results are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast._ops._convolution import Geometry
from tests.helpers.tolerance import assert_as_accurate

pytest.importorskip("triton", reason="needs Triton")

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# TF32 keeps 10 bits, bfloat16 7
ROUNDS = {"highest": torch.float32, "high": torch.float32, "medium": torch.bfloat16}


Blocks = list[Tensor]


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
