"""Rows as far as their roles: where there is no sample, or where no graph was looked at."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mtu_fast._rows.batch import Batch, Labelled, roles_of
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast.methods import Roles


def no_rows(batch: Batch, shared: Shared) -> list[TaskRows]:
    """The rows of a batch without a sample that gives one."""
    found = []
    for task, loss in batch.losses.items():
        # roles of no row, so that all that joins rows has a task to find
        nothing = torch.zeros(0, dtype=torch.int64, device=loss.device)
        roles = roles_of(task, nothing, nothing, loss[:0], loss.dtype)
        found.append(TaskRows.of(roles, {}, {}, shared, [batch.flags]))
    return found


def no_gradients(batch: Batch, shared: Shared) -> list[TaskRows]:
    """The rows of a batch as far as their roles, where no graph was looked at."""
    found = []
    for roles in sample_roles(batch, batch.labels()):
        found.append(TaskRows.of(roles, {}, {}, shared, [batch.flags]))
    return found


def sample_roles(batch: Batch, at: Mapping[str, Labelled]) -> list[Roles]:
    """Roles of the rows of each task, where no graph was looked at."""
    return [batch.roles(task, at[task], loss.dtype) for task, loss in batch.losses.items()]
