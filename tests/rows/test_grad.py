"""What is written to `.grad`, and zeros in its place where a step was unsound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast._rows.grad import addition

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
DTYPES += [torch.complex128]  # of more bytes than a whole number has


def gradients() -> dict[Tensor, Tensor]:
    """One of each dtype, with entries that no product with 0 makes 0, and a sparse one."""
    found: dict[Tensor, Tensor] = {}
    for dtype in DTYPES:
        g = torch.randn(2, 3, dtype=dtype)
        g[0] = torch.tensor([torch.nan, torch.inf, -0.0], dtype=dtype)
        found[torch.zeros(2, 3, dtype=dtype)] = g
    table = torch.zeros(4, 2)
    values = torch.tensor([[torch.nan, 1.0]])
    at = torch.tensor([[1]])
    found[table] = torch.sparse_coo_tensor(at, values, (4, 2), check_invariants=False)
    return found


@pytest.mark.parametrize("bad", [False, True])
def test_gradients_are_kept_bit_for_bit_or_are_zeros(bad: bool) -> None:
    given = gradients()
    addition(given, torch.tensor(bad)).write()
    for parameter, g in given.items():
        assert parameter.grad is not None
        found = parameter.grad.to_dense()
        if bad:
            assert not found.any()
        else:
            # bits: NaN is not equal to itself, and -0.0 is equal to 0.0
            assert torch.equal(found.view(torch.uint8), g.to_dense().view(torch.uint8))
