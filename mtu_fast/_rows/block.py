"""Rows kept across steps: side by side in a matrix for each step that gave some, so that none is copied to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
Reached = Mapping[str, frozenset[int]]
NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Block:
    """Explicit rows.

    Attributes:
        matrices: `[K_i, P]`, all parameters' columns in their order, the oldest rows first.
        roles: what they were in the steps that took them.
        reached: task -> the parameters that its rows reach, by index; zeros elsewhere.
        grams: group of parameters -> `[K, K]`, where it is known.
    """

    matrices: tuple[Tensor, ...]
    roles: Roles
    reached: Reached
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

    @property
    def parameters(self) -> list[int]:
        """Those that one of the rows reaches."""
        return sorted(NONE.union(*self.reached.values()))

    def to(self, dtype: torch.dtype | None) -> Block:
        """They in another dtype; None for as they are."""
        if dtype is None:
            return self
        return replace(self, matrices=tuple(matrix.to(dtype) for matrix in self.matrices))

    def before(self, new: Block) -> Block:
        """Both, the new ones last."""
        roles = join_roles([self.roles, new.roles])
        reached = {
            task: self.reached.get(task, NONE) | new.reached.get(task, NONE) for task in roles.tasks
        }
        return Block(self.matrices + new.matrices, roles, reached, {})

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
        uses = views(matrix, shared, block.parameters)
        part = TaskRows.explicit(roles, uses, shared, MEMORY)
        parts.append(replace(part, matrix=matrix, reached=block.reached))
    parts[-1].grams.update(block.grams)
    return parts


# ---- as plain values -----------------------------------------------------------------------------


def state_of(block: Block, shared: Shared) -> dict[str, Any]:
    """What `block_of` takes, as plain values and tensors."""
    whole = views(torch.cat(block.matrices), shared, block.parameters)
    roles = block.roles
    return {
        "vectors": {shared.names[j]: use.tensors[0] for j, use in whole.items()},
        "counts": [len(matrix) for matrix in block.matrices],
        "task": roles.task,
        "sample": roles.sample,
        "loss": roles.loss,
        "tasks": list(roles.tasks),
        "dtype": roles.dtype,
        "reached": {
            task: [shared.names[j] for j in sorted(reached)]
            for task, reached in block.reached.items()
        },
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
    reached = {task: _indices(state["reached"].get(task, ()), shared) for task in roles.tasks}
    _check_zeros(block, reached, shared)
    return replace(block, matrices=tuple(matrices), reached=reached, grams=grams)


def _indices(names: Sequence[str], shared: Shared) -> frozenset[int]:
    return frozenset(j for j, name in enumerate(shared.names) if name in names)


def _check_zeros(block: Block, reached: Reached, shared: Shared) -> None:
    """Rows are zero where they are said to reach nothing: those columns are never looked at.

    Raises:
        ValueError: they are not.
    """
    for t, task in enumerate(block.roles.tasks):
        rows = block.matrices[0][block.roles.task == t]
        for j, span in enumerate(columns(shared)):
            if j not in reached[task] and bool(rows[:, slice(*span)].any()):
                raise ValueError(
                    f"Memory: state: block: reached: found rows of task {task!r} that reach {shared.names[j]!r}, "
                    f"which is not among what is said of them; take the state as `state_dict` gave it."
                )


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
    return Block((matrix,), roles, dict.fromkeys(roles.tasks, reached), {})
