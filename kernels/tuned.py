"""Block sizes that were measured to be faster than those of `plans`; `python -m benchmarks.tune` writes them.

(kernel, architecture, dtype, precision, tile) -> (depth, warps, stages). None was measured yet.
"""

from __future__ import annotations

BLOCKS: dict[tuple[str, int, str, str, int], tuple[int, int, int]] = {}
