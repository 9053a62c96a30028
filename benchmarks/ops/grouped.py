"""Cases of `grouped_rows`: the rows of convolutions with few channels a group, beside a vendor call a sample."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.floor import Cost
from benchmarks.ops.case import KERNEL, REFERENCE, Bench, Case, Run
from mtu_fast._ops._convolution import Geometry, conv_weight_gradient
from mtu_fast._ops.grouped import grouped_rows


class Size(NamedTuple):
    """N samples of images `[inputs, side, side]`; a kernel of so many taps a side, padded by half of them."""

    samples: int
    inputs: int
    outputs: int
    groups: int
    side: int
    kernel: int
    stride: int = 1

    @property
    def name(self) -> str:
        """As a reader wants to see it."""
        taps = f"{self.kernel}x{self.kernel}" + (f"/{self.stride}" if self.stride > 1 else "")
        channels = (
            f"{self.inputs}" if self.inputs == self.outputs else f"{self.inputs}:{self.outputs}"
        )
        groups = "depthwise" if self.groups == self.inputs else f"groups {self.groups}"
        return f"{self.samples} x {channels} x {self.side}², {taps}, {groups}"


def _grouped(size: Size, device: str) -> Bench:
    n, inputs, outputs, groups, side, kernel, stride = size
    grid = (side + kernel // 2 * 2 - kernel) // stride + 1
    x = torch.randn(n, 1, inputs, side, side, device=device)
    b = torch.randn(n, 1, outputs, grid, grid, device=device)
    walk = ((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1))
    weight = (outputs, inputs // groups, kernel, kernel)
    geometry = Geometry(weight, *walk[1:], False, (0, 0), groups)

    def reference(dtype: torch.dtype) -> Tensor:
        return grouped_rows.reference(x.to(dtype), b.to(dtype), groups, *walk)

    runs: dict[str, Run] = {
        REFERENCE: partial(reference, torch.float32),
        KERNEL: partial(grouped_rows, x, b, groups, *walk),
    }
    parts: dict[str, Run] = {
        "one batch weight gradient": partial(conv_weight_gradient, x[:, 0], b[:, 0], geometry)
    }
    made = n * prod(weight)
    cost = Cost(4.0 * (x.numel() + b.numel()), 4.0 * made, flops32=2.0 * made * grid**2)
    return Bench(runs, partial(reference, torch.float64), runs[REFERENCE], cost, parts)


SIZES = {
    "quick": [Size(2, 4, 4, 4, 8, 3), Size(2, 3, 5, 1, 8, 3, 2)],
    "cpu": [
        Size(16, 128, 128, 128, 32, 3), Size(16, 512, 512, 512, 8, 3), Size(16, 512, 512, 512, 8, 3, 2),
        Size(16, 96, 96, 96, 56, 7), Size(16, 64, 64, 16, 32, 3), Size(16, 3, 64, 1, 64, 3),
        Size(16, 16, 64, 1, 64, 3),
    ],
    "cuda": [Size(128, 128, 128, 128, 32, 3), Size(128, 96, 96, 96, 56, 7)],
}  # fmt: skip


def cases(size: str) -> list[Case]:
    """The cases of one size: "quick", "cpu" or "cuda"."""
    return [
        Case("grouped_rows", each.name, ("grouped_rows",), partial(_grouped, each))
        for each in SIZES[size]
    ]
