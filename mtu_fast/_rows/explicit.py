"""Rows that are given as vectors, such as a basis from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtu_fast._arguments import check_tensors
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast._rows.uses import Dense, Use
from mtu_fast.methods import SUBSPACE, Roles


def explicit(
    shared: Shared, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype
) -> TaskRows:
    """K vectors, `[K, *shape]` for each parameter by name, as rows of kind SUBSPACE that outlive a step.

    Args:
        shared: the parameters whose space they lie in.
        vectors: {name of a parameter: its part of every vector}; zero where a parameter is left
            out.
        task: the task they are said to be of.
        dtype: the precision in which they were computed, whatever they are held in.

    Returns:
        K rows.
    """
    uses: dict[int, Use] = {}
    for name, v in vectors.items():
        uses[shared.names.index(name)] = Dense(tuple(v.shape[1:]), v)
    count = max((use.count for use in uses.values()), default=0)
    # vectors are of no sample and have no loss
    first = torch.zeros(count, dtype=torch.int64, device=shared.parameters[0].device)
    roles = Roles(
        task=first,
        sample=torch.full_like(first, -1),
        kind=torch.full_like(first, SUBSPACE),
        loss=first.to(torch.float64),
        tasks=(task,),
        dtype=dtype,
    )
    return TaskRows.lasting(roles, uses, shared, SUBSPACE)


def check_vectors(vectors: Any, shared: Shared) -> None:
    """Vectors are {name of a parameter: `[K, *shape]`}, one K for all.

    Raises:
        TypeError: no mapping, or something else than tensors in it.
        ValueError: an unknown name, or another shape.
    """
    if not isinstance(vectors, Mapping):
        found = type(vectors).__name__
        raise TypeError(
            f"subspace_rows: vectors: found {found}, expected {{name: tensor [K, *shape]}}."
        )
    shapes = {name: tuple(p.shape) for name, p in zip(shared.names, shared.parameters, strict=True)}
    count = None
    for name, v in vectors.items():
        called = f"subspace_rows: vectors[{name!r}]"
        check_tensors(**{called: v})
        shape = tuple(v.shape)
        if name not in shapes:
            raise ValueError(f"{called} has shape {shape}, expected a shared parameter.")
        # the first one says how many there are
        count = len(v) if count is None and v.dim() else count
        if shape != (count, *shapes[name]):
            raise ValueError(
                f"{called} has shape {shape}, expected [K, *{shapes[name]}], one K for all."
            )
