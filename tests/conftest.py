"""What every test runs under: fixed seeds, and NaN wherever memory has not been written."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

if torch.cuda.is_available():
    # cuBLAS is then deterministic, as asked for below
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # before a kernel is imported: Triton's functions are then run by numpy
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """`empty`, `new_empty` and `empty_like` give NaN (integers: the largest), so that a forgotten write shows."""
    # The switch that torch ties the filling to. On a GPU some of what models do has no
    # deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On layers this small, a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def only_new_objects() -> None:
    """What was there before the module's tests is left out of every collection: it is much."""
    leave_out_of_collections()


def leave_out_of_collections() -> None:
    """No later collection looks at what is there now: twelve thousand tests make each one take half a second."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    leave_out_of_collections()


def pytest_unconfigure() -> None:
    """Extensions count at the end of the process what was not collected."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
