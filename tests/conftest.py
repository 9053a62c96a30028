"""What every test runs under: fixed seeds, and NaN wherever memory has not been written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """`empty`, `new_empty` and `empty_like` give NaN (integers: the largest), so that a forgotten write shows."""
    torch.use_deterministic_algorithms(True)  # the switch that torch ties the filling to
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
