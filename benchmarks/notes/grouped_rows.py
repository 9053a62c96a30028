"""Rows of convolutions with few channels per group: one vendor call per sample over our kernel.

    python -m benchmarks.notes.grouped_rows [--quick]

A line per case: channels per group, side of the image, kernel, multiply-adds per row, and the vendor's
time over ours (above 1 ours is faster), the median of interleaved rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import interleaved
from mtu_fast._ops._convolution import Geometry, plain_rows
from mtu_fast._ops.grouped import grouped_rows


class Layer(NamedTuple):
    """A square convolution: `groups` times `inputs` to `outputs` channels, on images of one side."""

    groups: int
    inputs: int
    outputs: int
    side: int
    kernel: int
    stride: int
    samples: int

    @property
    def grid(self) -> int:
        """The side of the output."""
        return (self.side + self.kernel // 2 * 2 - self.kernel) // self.stride + 1

    @property
    def work(self) -> int:
        """Multiply-adds of one row."""
        return self.outputs * self.inputs * self.kernel**2 * self.grid**2

    def drawn(self) -> tuple[Tensor, Tensor, Geometry]:
        """Inputs, output gradients, and how the convolution walks."""
        x = torch.randn(self.samples, 1, self.groups * self.inputs, self.side, self.side)
        b = torch.randn(self.samples, 1, self.outputs, self.grid, self.grid)
        shape = (self.outputs, self.inputs, self.kernel, self.kernel)
        walk = (self.stride,) * 2, (self.kernel // 2,) * 2, (1, 1)
        return x, b, Geometry(shape, *walk, False, (0, 0), self.groups)


LAYERS = [
    Layer(1, 1, 6, 28, 5, 1, 64),
    Layer(1, 16, 16, 32, 3, 1, 16),
    Layer(1, 4, 64, 64, 3, 1, 8),
    Layer(1, 8, 64, 64, 3, 1, 8),
    Layer(1, 16, 64, 64, 3, 1, 8),
    Layer(1, 3, 96, 224, 4, 4, 4),
    Layer(1, 3, 64, 224, 7, 2, 4),
    Layer(1, 8, 8, 256, 3, 1, 4),
    Layer(1, 16, 16, 512, 3, 1, 2),
    Layer(4, 32, 32, 16, 3, 1, 16),
    Layer(4, 64, 64, 16, 3, 1, 16),
    Layer(1, 64, 64, 64, 3, 1, 8),
]
QUICK = [Layer(1, 2, 4, 8, 3, 1, 2)]


def ratio(layer: Layer, rounds: int) -> float:
    """The vendor's time over ours."""
    x, b, geometry = layer.drawn()
    walk = geometry.kernel, geometry.stride, geometry.padding, geometry.dilation

    def ours() -> object:
        return grouped_rows(x, b, layer.groups, *walk)

    times = interleaved({"vendor": lambda: plain_rows(x, b, geometry), "ours": ours}, rounds)
    return times["vendor"].ratio(times["ours"])[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small case, to see that it runs")
    quick = parser.parse_args(argv).quick
    for layer in QUICK if quick else LAYERS:
        print(*layer, layer.work, f"{ratio(layer, 1 if quick else 7):.2f}")


if __name__ == "__main__":
    main()
