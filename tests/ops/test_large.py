"""Sizes and distances at the far end: elements beyond 2³¹ of their tensor, the most rows that are promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast._ops.gram import conv_direct, conv_ghost, outer_direct, outer_ghost, row_gram
from mtu_fast._ops.gram_schmidt import basis, gram_schmidt, transform
from mtu_fast._ops.grouped import grouped_rows
from mtu_fast._ops.project import project_op
from tests.helpers.matrices import conditioned, random_vector
from tests.helpers.truth import relative_error

FAR = (1 << 31) + 16  # elements
WALK = ([2, 2], [1, 1], [0, 0], [1, 1], "highest")
CALLS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Any]]] = {
    "row_gram": ((2, 5), lambda t: row_gram([t])),
    "outer_ghost": ((2, 3, 4), lambda t: outer_ghost([t], [torch.ones(2, 3, 2)], "highest")),
    "outer_direct": ((2, 3, 4), lambda t: outer_direct([t], [torch.ones(2, 3, 2)], "highest")),
    "conv_ghost": ((2, 1, 2, 3, 3), lambda t: conv_ghost([t], [torch.ones(2, 1, 2, 2, 2)], *WALK)),
    "conv_direct": (
        (2, 1, 2, 3, 3),
        lambda t: conv_direct([t], [torch.ones(2, 1, 2, 2, 2)], *WALK),
    ),
    "grouped_rows": (
        (2, 1, 2, 3, 3),
        lambda t: grouped_rows(t, torch.ones(2, 1, 2, 2, 2), 2, *WALK[:4]),
    ),
    "project": ((2, 5), lambda t: project_op([torch.ones(1, 5)], [t], False)[0]),
    "transform": (
        (2, 5),
        lambda t: transform([t], torch.tensor([[1.0, 0.0], [2.0, 3.0]], dtype=torch.float64))[0],
    ),
}


@pytest.fixture
def memory(tmp_path: Path) -> Tensor:
    """Float32 elements that are not there until written: a file with a hole."""
    elements = 4 * FAR + 64
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(4 * elements)
    return torch.from_file(str(tmp_path / "hole"), shared=True, size=elements)


@pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name in CALLS for axis in range(len(CALLS[name][0]))]
)
def test_elements_beyond_two_to_the_31(name: str, axis: int, memory: Tensor) -> None:
    shape, call = CALLS[name]
    near = torch.randn(shape)
    strides = list(near.stride())
    strides[axis] = FAR
    far = memory.as_strided(shape, strides).copy_(near)
    assert relative_error(call(far), call(near)) <= 1e-15


@pytest.mark.parametrize("rows", [129, 512])
def test_many_rows(rows: int) -> None:
    J = conditioned(rows, 600, 1e2)
    G, g = J @ J.mT, random_vector(600)
    x, rank = gram_schmidt(G, J @ g, torch.ones(rows, dtype=torch.bool), 1e-7)
    assert int(rank) == rows
    assert relative_error(J.mT @ x, J.mT @ torch.linalg.solve(G, J @ g)) <= 1e-10
    T, kept = basis(G, 1e-7)
    assert bool(kept.all())
    assert relative_error(T @ G @ T.mT, torch.eye(rows, dtype=torch.float64)) <= 1e-10
