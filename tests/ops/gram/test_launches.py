"""What the routes by rows launch where each launch has a price: counted on tensors without memory."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import Sizes, build
from benchmarks.waits import recorded
from mtu_fast._ops import _tiles, routes
from mtu_fast._ops._convolution import Geometry
from mtu_fast._ops._prices import CUDA_KERNELS
from mtu_fast._ops.conv_direct import conv_direct
from mtu_fast._ops.outer_direct import outer_direct

SAMPLES, TASKS = 128, 3
MEMORY = 24 << 30  # of a consumer's card
Layer = tuple[nn.Conv2d, torch.Size, torch.Size]


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and prices of a GPU, for tensors on `meta`."""
    properties = SimpleNamespace(total_memory=MEMORY)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    _tiles._buffer_of_gpu.cache_clear()
    size = _tiles.buffer(torch.device("cuda", 0))
    _tiles._buffer_of_gpu.cache_clear()
    assert size == MEMORY // _tiles.BYTES_OF_GPU
    assert _tiles.buffer(torch.device("cpu")) == _tiles.buffer(torch.device("meta")) < size
    monkeypatch.setattr(_tiles, "BUFFER", size)
    monkeypatch.setattr(routes, "prices", lambda device: CUDA_KERNELS)


def convolutions() -> list[Layer]:
    """Those of a ResNet-18, with the shapes of one image before and after."""
    case = build("resnet", 1, sizes=Sizes(1))
    found: list[Layer] = []
    for layer in case.model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda m, i, o: found.append((m, i[0].shape, o.shape)))
    case.losses()
    return found


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_large_step_of_a_resnet_takes_a_few_hundred_launches() -> None:
    """Rows of all tasks are one op a tile of channels; a call per sample and tile would be half a million."""
    launches, per_sample = 0, 0
    for layer, image, grid in convolutions():
        x = [empty(SAMPLES, 1, *image[1:])] * TASKS  # the tasks share it
        b = [empty(SAMPLES, 1, *grid[1:]) for _ in range(TASKS)]
        walk = (layer.stride, layer.padding, layer.dilation)
        g = Geometry(tuple(layer.weight.shape), *walk, False, (0, 0), 1)
        assert routes.conv_route(x, b, g) == "direct"
        step = partial(conv_direct.reference, x, b, g.kernel, *walk, "highest")
        launches += recorded(step).launches
        rows, width = SAMPLES * TASKS, layer.weight[0].numel()
        per_sample += rows * -(-layer.out_channels // max(1, (1 << 22) // (rows * width)))
    assert per_sample > 400_000
    assert launches < 500


@pytest.mark.usefixtures("as_on_a_gpu")
def test_rows_of_a_linear_layer_take_a_call_a_tile() -> None:
    left, right = [empty(384, 256, 1024)], [empty(384, 256, 4096)]
    found = recorded(partial(outer_direct.reference, left, right, "highest"))
    tiles = 384 * 1024 * 4096 // (MEMORY // _tiles.BYTES_OF_GPU) + 1
    assert found.launches < 10 * tiles
