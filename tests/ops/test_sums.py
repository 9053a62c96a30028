"""Sums of values by an index."""

from __future__ import annotations

import pytest
import torch

from mtu_fast._ops._sums import summed_at


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("shape", [(40, 3), (40,), (40, 2, 3), (0, 3), (5_000, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_device_sums_the_same(
    on_gpu: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """What serves a GPU runs on the CPU, too."""
    index = torch.randint(0, 7, shape[:1])
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    found = summed_at(index, values.as_subclass(Elsewhere) if on_gpu else values, 8)
    hot = (index == torch.arange(8)[:, None]).double()
    expected = torch.tensordot(hot, values.double(), 1)
    assert found.shape == (8, *shape[1:]) and found.dtype == dtype
    torch.testing.assert_close(
        found.as_subclass(torch.Tensor).double(),
        expected,
        rtol=1e-5,
        atol=1e-4 if dtype == torch.float32 else 1e-10,
    )


@pytest.mark.gpu
def test_the_same_bits_every_time_on_a_gpu() -> None:
    index = torch.randint(0, 50, (200_000,), device="cuda")
    values = torch.randn(200_000, 24, device="cuda")
    first = summed_at(index, values, 50)
    assert all(torch.equal(summed_at(index, values, 50), first) for _ in range(5))
