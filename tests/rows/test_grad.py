"""What is written to `.grad`, and zeros in its place where a step was unsound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
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


def test_a_sparse_grad_of_other_sparse_dimensions_is_named() -> None:
    """Torch's own words for it are of densities, and name no tensor."""
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4, sparse=True), torch.nn.Flatten())
    table, tokens = model[0].weight, torch.randint(7, (5, 3))
    engine, forget = mtu.Engine(model), torch.arange(5) < 2
    for dimensions in (2, 1):
        before = torch.eye(7, 4).to_sparse(dimensions)
        table.grad = before
        losses = model(tokens).square().mean(1)
        if dimensions == 2:
            with pytest.raises(
                RuntimeError, match=r"found a sparse .grad with 2 sparse dimen.*expected 1"
            ):
                engine.backward(losses, mtu.OrthoGrad(0.5), forget=forget)
            assert table.grad is before
        else:
            engine.backward(losses, mtu.OrthoGrad(0.5), forget=forget)
            assert table.grad.is_sparse and not torch.equal(
                table.grad.to_dense(), before.to_dense()
            )
