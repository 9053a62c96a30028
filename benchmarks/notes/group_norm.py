"""Rows of a group norm's scale: torch's own backward with one group per image and channel, against plain torch.

python -m benchmarks.notes.group_norm [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import interleaved


def native(x: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    """Rows [N·C] by the backward of a group norm in which every image's channel is a channel of its own."""
    N, C, H = x.shape
    _, rows, _ = torch.ops.aten.native_group_norm_backward(
        b.view(1, N * C, H), x.view(1, N * C, H), mean.view(1, -1), rstd.view(1, -1),
        torch.ones(N * C), 1, N * C, H, N * groups, (False, True, False),
    )  # fmt: skip
    return rows


def written_out(x: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    """The same rows by normalising, multiplying and summing."""
    normal = (x.view(len(x), groups, -1) - mean[..., None]) * rstd[..., None]
    return (b * normal.view_as(x)).sum(-1)


def main(argv: Sequence[str] | None = None) -> float:
    """Print both times in ms; return the largest difference of the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small case, to see that it runs")
    quick = parser.parse_args(argv).quick
    N, C, H, groups = (2, 4, 16, 2) if quick else (16, 64, 4096, 32)
    torch.set_num_threads(1)
    x, b = torch.randn(2, N, C, H)
    _, mean, rstd = torch.native_group_norm(x, None, None, N, C, H, groups, 1e-5)
    ways = {
        "native": lambda: native(x, b, mean, rstd, groups),
        "written out": lambda: written_out(x, b, mean, rstd, groups),
    }
    for name, times in interleaved(ways, 1 if quick else 9).items():
        print(f"{name}: {times.median:.2f} ms")
    return float((ways["native"]().view(N, C) - ways["written out"]()).abs().max())


if __name__ == "__main__":
    main()
