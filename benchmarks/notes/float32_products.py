"""What float32 products of rows would save on a CPU: beside the float64 op, on rows that lie in its cache.

python -m benchmarks.notes.float32_products [--quick]

*vendor* multiplies 512 columns at a time in float32, and adds the products in float64; the float64 op
makes each product of two rows once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measure import interleaved
from mtu_fast._ops.gram import row_gram

TILES = ((16, 4096), (36, 4096), (48, 4096), (99, 3072), (192, 2048))  # rows, columns
COLUMNS = 512  # whose products are added in float32


def by_vendor(rows: Tensor) -> Tensor:
    """`G = J Jᵀ`, float32 products, float64 sums."""
    found = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(COLUMNS, 1):
        found += part @ part.T
    return found


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Print a line a tile; return the vendor's time over the op's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    given = parser.parse_args(argv)
    ratios = []
    for count, columns in TILES:
        rows = torch.randn(count, columns)
        calls = {"float64": lambda t=rows: row_gram([t]), "vendor": lambda t=rows: by_vendor(t)}
        times = interleaved(calls, 3 if given.quick else 101)
        ratio, spread = times["vendor"].ratio(times["float64"])
        ratios.append(ratio)
        print(
            f"{count:>3} rows: float64 {1e3 * times['float64'].median:.0f} us, vendor {ratio:.2f} ± {spread:.2f} of it"
        )
    return ratios


if __name__ == "__main__":
    main()
