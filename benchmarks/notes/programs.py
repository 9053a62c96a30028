"""The convex methods beside TorchJD's weightings: CPU time of a call, on rows of which most conflict.

    python -m benchmarks.notes.programs [--quick]

A line per method: ms for R rows × B matrices, ours and then TorchJD's, which go matrix by matrix.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import mtu_fast as mtu

SIZES = [(6, 1), (6, 60), (48, 1), (48, 60)]
QUICK = [(3, 2)]
METHODS: dict[str, mtu.Method] = {
    "MGDA": mtu.MGDA(),
    "DualProj": mtu.DualProj(),
    "UPGrad": mtu.UPGrad(),
    "CAGrad": mtu.CAGrad(),
}


def grams(rows: int, count: int) -> Tensor:
    """Gram matrices [B, R, R] of rows most of which conflict."""
    torch.manual_seed(0)
    J = torch.randn(count, rows, 100, dtype=torch.float64)
    J -= 0.9 * J.mean(1, keepdim=True)
    return J @ J.mT


def roles(rows: int) -> mtu.Roles:
    """Retained mean rows of one task."""
    zeros = torch.zeros(rows, dtype=torch.int64)
    return mtu.Roles(zeros, zeros, zeros, zeros.double(), ("a",))


def milliseconds(call: Callable[[], object], least: float) -> float:
    """CPU time of a call, the mean over calls that together take `least` seconds."""
    call()
    start, calls = time.process_time(), 0
    while calls == 0 or time.process_time() - start < least:
        call()
        calls += 1
    return 1e3 * (time.process_time() - start) / calls


def each(weighting: Callable[[Tensor], Tensor], G: Tensor) -> list[Tensor]:
    """A weighting of single matrices on every matrix of a batch."""
    return [weighting(one) for one in G]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per method."""
    from torchjd import aggregation

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small case, to see that it runs")
    quick = parser.parse_args(argv).quick
    torch.set_num_threads(1)
    least = 0.0 if quick else 0.5
    for name, method in METHODS.items():
        weighting = getattr(aggregation, f"{name}Weighting", None)
        cells = []
        for rows, count in QUICK if quick else SIZES:
            G, who = grams(rows, count), roles(rows)
            cell = f"{rows} × {count}: {milliseconds(partial(method, G, who), least):.3g}"
            if weighting is not None and name != "CAGrad":  # theirs is another program
                cell += f", {milliseconds(partial(each, weighting(), G), least):.3g}"
            cells.append(cell)
        print(f"{name:9}" + "  ".join(cells))


if __name__ == "__main__":
    main()
