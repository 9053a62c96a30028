"""Below which length what is left of a row counts as nothing."""

from __future__ import annotations

import torch

# Rounding of a row of that dtype, with room for sums.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def check_tolerance(name: str, tol: float) -> None:
    """Raise a ValueError unless `tol` is a length between 0 and 1."""
    if not 0 < tol < 1:
        raise ValueError(
            f"{name}: tol is {tol}, expected a length between 0 and 1, such as 1e-6 for float32 rows."
        )
