"""Convolutions of several tasks that read one input: their rows, and sums of them, are those of each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtu_fast._ops._convolution import Geometry
from mtu_fast._rows.one_input import joined
from mtu_fast._rows.uses import Chain, Conv, Outer, Use
from tests.helpers.truth import relative_error

R, C, O = 5, 3, 4
GEOMETRIES = {
    "plain": Geometry((O, C, 3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 1),
    "strides and dilation": Geometry((O, C, 3, 2), (2, 1), (2, 1), (2, 2), False, (0, 0), 1),
    "grouped": Geometry((3 * O, 1, 3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 3),
    "transposed": Geometry((C, O, 3, 3), (1, 1), (1, 1), (1, 1), True, (0, 0), 1),
}


def convolution(x: Tensor, geometry: Geometry, frames: int) -> Conv:
    """A task's use: gradients of its own, where the convolution's output has them."""
    weight = torch.zeros(geometry.weight, dtype=torch.float64)
    y = torch.ops.aten.convolution(
        x.flatten(0, 1), weight, None, geometry.stride, geometry.padding, geometry.dilation,
        geometry.transposed, geometry.output_padding, geometry.groups,
    )  # fmt: skip
    b = torch.randn(R, frames, *y.shape[1:], dtype=torch.float64)
    return Conv(geometry.weight, x, b, geometry)


def check(uses: list[Use], at: list[Tensor], count: int) -> None:
    found = joined(uses, at)
    assert len(found) == count
    assert sorted(i for some in found for i in some.of) == list(range(len(uses)))
    for some in found:
        for i, rows, total in zip(some.of, some.rows(), some.sums(), strict=True):
            expected = uses[i].select(at[i]).grounded().matrix()
            assert relative_error(rows, expected) <= 1e-13
            assert relative_error(total, expected.sum(0)) <= 1e-13


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_tasks_of_one_input(name: str, frames: int) -> None:
    torch.manual_seed(0)
    geometry = GEOMETRIES[name]
    x = torch.randn(R, frames, C, 6, 7, dtype=torch.float64)
    uses: list[Use] = [convolution(x, geometry, frames) for _ in range(3)]
    some, every = torch.tensor([0, 3, 4]), torch.arange(R)
    alone = 3 if not geometry.plain else 1
    check(uses, [some] * 3, alone)
    check(uses, [every] * 3, alone)
    # those of one task are others
    check(uses, [some, every, some], 3 if not geometry.plain else 2)


def pixel_by_pixel(images: Tensor) -> Tensor:
    """`[R, F, C, *]` in channels-last memory."""
    return images.movedim(2, -1).contiguous().movedim(-1, 2)


def test_sums_in_another_order_of_memory() -> None:
    """Channels-last images; a use whose chain turns its rows."""
    torch.manual_seed(0)
    geometry, every = GEOMETRIES["plain"], torch.arange(R)
    x = pixel_by_pixel(torch.randn(R, 1, C, 6, 7, dtype=torch.float64))
    uses: list[Use] = []
    for _ in range(2):
        use = convolution(x, geometry, 1)
        uses.append(replace(use, b=pixel_by_pixel(use.b)))
    check(uses, [every] * 2, 1)
    turned = Chain(("turned",), lambda g: g.t())
    outer = Outer((O, C), torch.randn(R, 2, O).double(), torch.randn(R, 2, C).double())
    (alone,) = joined([replace(outer, chain=turned)], [every])
    assert relative_error(alone.sums()[0], outer.vjp(None).t().flatten()) <= 1e-13


def test_what_is_not_joined() -> None:
    """Another input, though equal; another kernel; a chain; another kind."""
    torch.manual_seed(0)
    geometry, every = GEOMETRIES["plain"], torch.arange(R)
    x = torch.randn(R, 1, C, 6, 7, dtype=torch.float64)
    first = convolution(x, geometry, 1)
    dilated = replace(geometry, padding=(2, 2), dilation=(2, 2))
    uses: list[Use] = [
        first,
        convolution(x.clone(), geometry, 1),
        convolution(x, dilated, 1),
        replace(first, chain=Chain(("flipped",), lambda g: g.flip(0))),
        Outer((O * C, 9), torch.randn(R, 2, O * C).double(), torch.randn(R, 2, 9).double()),
    ]
    check(uses, [every] * len(uses), len(uses))
