"""Rows kept across steps: side by side in a matrix for each step that gave some, so that none is copied to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from mtu_fast._rows.columns import columns, views
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows, join_roles
from mtu_fast.methods import MEMORY, RETAIN, Roles

MATRICES = 8  # more are joined: many small products cost more than the copy

Grams = Mapping[tuple[int, ...], Tensor]  # group of parameters -> Gram of rows


@dataclass(frozen=True)
class Block:
    """Explicit rows.

    Attributes:
        matrices: `[K_i, P]`, all parameters' columns in their order, the oldest rows first.
        roles: what they were in the steps that took them.
        reached: the parameters that one of them reaches, by index.
        grams: group of parameters -> `[K, K]`, where it is known.
    """

    matrices: tuple[Tensor, ...]
    roles: Roles
    reached: frozenset[int]
    grams: Grams

    def __len__(self) -> int:
        return len(self.roles)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        return self.nbytes // len(self)

    def to(self, dtype: torch.dtype | None) -> Block:
        """They in another dtype; None for as they are."""
        if dtype is None:
            return self
        return replace(self, matrices=tuple(matrix.to(dtype) for matrix in self.matrices))

    def before(self, new: Block) -> Block:
        """Both, the new ones last."""
        roles = join_roles([self.roles, new.roles])
        return Block(self.matrices + new.matrices, roles, self.reached | new.reached, {})

    def select(self, at: Tensor) -> Block:
        """The rows at these indices, which ascend; a matrix of which all stay is not copied."""
        kept, start = [], 0
        for matrix in self.matrices:
            mine = at[(at >= start) & (at < start + len(matrix))] - start
            start += len(matrix)
            if len(mine):
                kept.append(matrix if len(mine) == len(matrix) else matrix[mine])
        # on a GPU every further matrix is a kernel call in each product
        if len(kept) > MATRICES or not at.is_cpu:
            kept = [torch.cat(kept)]
        return Block(tuple(kept), chosen(self.roles, at), self.reached, {})


def chosen(roles: Roles, at: Tensor) -> Roles:
    """Roles of the rows at these indices."""
    names = ["task", "sample", "kind", "loss"]
    if roles.rank is not None:
        names.append("rank")
    return replace(roles, **{name: getattr(roles, name)[at] for name in names}, memory=0)


def in_memory(block: Block, shared: Shared) -> list[TaskRows]:
    """The rows as rows of kind MEMORY that outlive a step, a part for each matrix; the last has the Grams."""
    counts = [len(matrix) for matrix in block.matrices]
    # which rows of the block each matrix holds
    places = torch.arange(len(block), device=block.roles.task.device).split(counts)
    parts = []
    for matrix, at in zip(block.matrices, places, strict=True):
        # `memory` says how many of the rows are in memory: all of this part
        own = chosen(block.roles, at)
        roles = replace(own, kind=torch.full_like(own.kind, MEMORY), memory=len(own))
        uses = views(matrix, shared, sorted(block.reached))
        part = TaskRows.explicit(roles, uses, shared, MEMORY)
        parts.append(replace(part, matrix=matrix))
    parts[-1].grams.update(block.grams)
    return parts


# ---- as plain values -----------------------------------------------------------------------------


def state_of(block: Block, shared: Shared) -> dict[str, Any]:
    """What `block_of` takes, as plain values and tensors."""
    whole = views(torch.cat(block.matrices), shared, sorted(block.reached))
    roles = block.roles
    return {
        "vectors": {shared.names[j]: use.tensors[0] for j, use in whole.items()},
        "counts": [len(matrix) for matrix in block.matrices],
        "task": roles.task,
        "sample": roles.sample,
        "loss": roles.loss,
        "tasks": list(roles.tasks),
        "dtype": roles.dtype,
        "grams": [[list(group), gram] for group, gram in block.grams.items()],
    }


def block_of(state: Mapping[str, Any], shared: Shared) -> Block:
    """What `state_of` gave as a block of the same matrices."""
    roles = Roles(
        task=state["task"],
        sample=state["sample"],
        kind=torch.full_like(state["task"], RETAIN),
        loss=state["loss"],
        tasks=tuple(state["tasks"]),
        dtype=state["dtype"],
    )
    block = of_vectors(state["vectors"], roles, shared)
    # memory of their own: a block lets its matrices go one by one
    matrices = [part.clone() for part in block.matrices[0].split(state["counts"])]
    grams = {tuple(group): gram for group, gram in state["grams"]}
    return replace(block, matrices=tuple(matrices), grams=grams)


def of_vectors(vectors: Mapping[str, Tensor], roles: Roles, shared: Shared) -> Block:
    """K vectors, `[K, *shape]` for each parameter by name, as rows; zero where a parameter is left out."""
    like = next(iter(vectors.values()))
    dtype = reduce(torch.promote_types, [v.dtype for v in vectors.values()])
    matrix = like.new_zeros(len(like), sum(p.numel() for p in shared.parameters), dtype=dtype)
    reached = frozenset(j for j, name in enumerate(shared.names) if name in vectors)
    for j, span in enumerate(columns(shared)):
        if j in reached:
            given = vectors[shared.names[j]].detach()
            matrix[:, slice(*span)] = given.reshape(len(like), -1)
    return Block((matrix,), roles, reached, {})
