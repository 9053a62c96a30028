"""Convolutions, recurrent layers and norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.recorded.cases import (
    Case,
    case,
    x,
)

_shape: tuple[int, ...]  # of every loop below


# ---- convolution, recurrence ---------------------------------------------------------------------


def convolved(
    channels: int, out: int, groups: int, transposed: bool, space: int, batch: int | None = 2
) -> Case:
    """A convolution with a bias, over one to three dimensions of space."""

    def make() -> Tensor:
        name = f"conv{'_transpose' if transposed else ''}{space}d"
        images = x(*([] if batch is None else [batch]), channels, *range(4, 4 + space))
        kernel = (channels, out // groups) if transposed else (out, channels // groups)
        found: Tensor = getattr(F, name)(
            images, x(*kernel, *[2] * space), x(out), groups=groups, stride=1
        )
        return found

    return make


for _transposed in (False, True):
    for _space in (1, 2, 3):
        case(
            "Convolution",
            convolved(4, 6, 2, _transposed, _space),
            convolved(3, 3, 3, _transposed, _space),
        )
        case(
            "Convolution",
            convolved(2, 2, 1, _transposed, _space),
            convolved(3, 2, 1, _transposed, _space, None),
        )
case(
    "Convolution",
    lambda: F.conv2d(x(2, 3, 4, 4).to(memory_format=torch.channels_last), x(3, 1, 2, 2), groups=3),
)


def recurrent(first: bool, both_ways: bool = False, layers: int = 1) -> Case:
    """An LSTM as the CPU runs it."""

    def make() -> tuple[Tensor, ...]:
        net = nn.LSTM(2, 2, layers, batch_first=first, bidirectional=both_ways)
        states = [
            torch.randn(layers * (1 + both_ways), 3 if first else 2, 2).requires_grad_()
            for _ in range(2)
        ]
        sequences, (hidden, cell) = net(torch.randn(3, 2, 2).requires_grad_(), tuple(states))
        return sequences, hidden, cell

    return make


case(
    "MkldnnRnnLayer",
    recurrent(False),
    recurrent(True),
    recurrent(False, both_ways=True),
    recurrent(False, layers=2),
)


# ---- statistics ----------------------------------------------------------------------------------

for _shape, _normed in (
    ((2, 3, 4), (4,)),
    ((2, 3, 4), (3, 4)),
    ((3, 3), (3,)),
    ((2, 3), (2, 3)),
    ((4,), (4,)),
):
    case("NativeLayerNorm", lambda s=_shape, n=_normed: F.layer_norm(x(*s), n, x(*n), x(*n)))
    case("NativeLayerNorm", lambda s=_shape, n=_normed: F.layer_norm(x(*s), n))
for _shape in ((2, 4), (2, 4, 3), (4, 4, 2, 3)):
    case("NativeGroupNorm", lambda s=_shape: F.group_norm(x(*s), 2, x(4), x(4)))
    case("NativeGroupNorm", lambda s=_shape: F.group_norm(x(*s), 4, x(4), x(4)))
    for _training in (False, True):
        case(
            "NativeBatchNorm",
            lambda s=_shape, t=_training: F.batch_norm(
                x(*s), torch.zeros(4).double(), torch.ones(4).double(), x(4), x(4), training=t
            ),
        )
case("NativeBatchNorm", lambda: F.instance_norm(x(2, 4, 3), weight=x(4), bias=x(4)))
