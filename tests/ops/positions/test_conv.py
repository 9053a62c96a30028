"""Grams of convolutions by both routes, as dispatched (the kernel, where it is built) and as references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtu_fast._ops.gram import conv_direct, conv_ghost
from tests.ops.positions.exact import (
    built,
    conv_exact,
    images,
    integers,
    named,
    walk,
)


@pytest.fixture(params=named([conv_ghost, conv_direct]))
def conv(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = request.param
    return found


WALKS = {
    "3x3": walk(),
    "strided": walk(3, 2, 1),
    "dilated": walk(3, 1, 2, 2),
    "strided, dilated": walk(2, 2, 3, 3),
    "pixels left over": walk(2, 3, 0),
    "pointwise": walk(1, 1, 0),
    "pointwise, padded": walk(1, 1, 1),
    "pointwise, strided": walk(1, 2, 0),
    "patches": walk(4, 4, 0),
}


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("size", [(4, 4), (5, 9), (17, 16)])
def test_every_walk(conv: Callable[..., Tensor], name: str, size: tuple[int, int]) -> None:
    """Several images to a tile, one, and several boxes to an image; three tasks on one forward, one on another."""
    arguments = WALKS[name]
    x, b = images(3, 2, 3, size, 4, arguments)
    y, c = images(5, 1, 3, (size[1], size[0]), 4, arguments)
    xs, bs = [x, x, y, x], [b, integers(*b.shape), c, integers(*b.shape)]
    assert torch.equal(conv(xs, bs, *arguments), conv_exact(xs, bs, arguments))


def test_images_beyond_one_box_along_every_axis(conv: Callable[..., Tensor]) -> None:
    arguments = walk(3, 2, 1)
    x, b = images(1, 1, 2, (61, 47), 2, arguments)
    assert torch.equal(conv([x], [b], *arguments), conv_exact([x], [b], arguments))


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (3, 0), (0, 0)])
def test_no_channels(conv: Callable[..., Tensor], inputs: int, outputs: int) -> None:
    x, b = images(2, 1, inputs, (5, 5), outputs, walk())
    assert torch.equal(conv([x], [b], *walk()), torch.zeros(2, 2, dtype=torch.float64))


def test_one_input_under_several_walks_of_sizes(conv: Callable[..., Tensor]) -> None:
    arguments = walk()
    x, b = images(4, 1, 3, (6, 6), 2, arguments)
    xs = [x, x.transpose(3, 4), x.clone(), x[:0]]
    bs = [b, integers(*b.shape).transpose(3, 4), integers(*b.shape), b[:0]]
    assert torch.equal(conv(xs, bs, *arguments), conv_exact(xs, bs, arguments))


@built
def test_a_pixel_that_no_tap_reaches_does_not_matter() -> None:
    arguments = walk(2, 3, 0)
    x, b = images(2, 1, 3, (6, 6), 2, arguments)
    expected = conv_exact([x], [b], arguments)
    x[:, :, :, 2, :] = float("nan")
    for conv in (conv_ghost, conv_direct):
        assert torch.equal(conv([x], [b], *arguments), expected)


@pytest.mark.parametrize("side", [0, 1])
def test_an_image_that_is_not_finite(conv: Callable[..., Tensor], side: int) -> None:
    arguments = walk()
    pair = images(5, 1, 3, (4, 4), 4, arguments)
    pair[side][2, 0, 1, 3, 3] = float("nan")
    found = conv([pair[0]], [pair[1]], *arguments)
    assert torch.equal(found.isnan(), (torch.arange(5) == 2)[:, None] | (torch.arange(5) == 2))
