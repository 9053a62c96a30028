"""Rows of convolutions from patches, as a GPU forms them, over one vendor call per row, on this CPU.

    python -m benchmarks.notes.patch_rows [--quick]

A line per case: channels before and after, side of the image, and the time from patches over that of the
calls (above 1 the calls are faster), the median of interleaved rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.measure import interleaved
from benchmarks.notes.grouped_rows import Layer
from mtu_fast._ops._convolution import patch_rows, plain_rows

LAYERS = [
    Layer(1, 512, 512, 4, 3, 1, 16),
    Layer(1, 512, 512, 8, 3, 1, 16),
    Layer(1, 256, 256, 8, 3, 1, 16),
    Layer(1, 128, 128, 16, 3, 1, 16),
    Layer(1, 64, 64, 32, 3, 1, 16),
    Layer(1, 64, 64, 64, 3, 1, 16),
]
QUICK = [Layer(1, 2, 4, 8, 3, 1, 2)]


def ratio(layer: Layer, rounds: int) -> float:
    """The time from patches over that of the calls."""
    x, b, geometry = layer.drawn()
    ways = {
        "calls": lambda: plain_rows(x, b, geometry),
        "patches": lambda: patch_rows(x, b, geometry),
    }
    times = interleaved(ways, rounds)
    return times["patches"].ratio(times["calls"])[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small case, to see that it runs")
    quick = parser.parse_args(argv).quick
    for layer in QUICK if quick else LAYERS:
        took = ratio(layer, 1 if quick else 7)
        print(layer.inputs, layer.outputs, layer.side, f"{took:.2f}")


if __name__ == "__main__":
    main()
