"""What a row is: its role, task, sample and loss; and the weights that follow from these alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mtu_fast._arguments import check_dense, check_dtype, shown

RETAIN, FORGET, SUBSPACE, RESTING, MEMORY, ABSENT = range(6)


@dataclass(frozen=True)
class Roles:
    """What row r is: kind[r] of task tasks[task[r]], sample[r] of its forward, with loss value loss[r].

    Attributes:
        task: [R] int64, index into `tasks`.
        sample: [R] int64, index of the sample within its forward; -1 where the row is a mean.
        kind: [R] int64. RETAIN and FORGET rows are the step's; a RESTING one is to be forgotten and
            past its level, so that it has no weight. SUBSPACE and MEMORY rows are of earlier steps:
            an `mtu_fast.Subspace` spans where an update may move, an `mtu_fast.Memory` what it must
            not move along. An ABSENT one
            is a row of zeros in the place of a sample without a label, where only a GPU knows which
            those are (`Method.allows_absent`).
        loss: [R] float64, detached loss values.
        tasks: names of the tasks.
        dtype: the precision in which the rows' gradients were computed.
        rank: [R] int64, the rank of the process that holds the row, and whose forward `sample`
            counts in; means over all ranks are held by rank 0. None on one process.
        memory: how many rows are of kind MEMORY, which are then the last; no wait for the device.

    Raises:
        ValueError: the tensors are not vectors of one length.
        TypeError: `task`, `sample`, `kind` or `rank` is not int64, `loss` no real tensor, `tasks` no
            names, or `dtype` none of floating numbers.
    """

    task: Tensor
    sample: Tensor
    kind: Tensor
    loss: Tensor
    tasks: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    rank: Tensor | None = None
    memory: int = 0

    def __post_init__(self) -> None:
        columns = {"task": self.task, "sample": self.sample, "kind": self.kind, "loss": self.loss}
        if self.rank is not None:
            columns["rank"] = self.rank
        for name, column in columns.items():
            _check_column(name, column)
        if not isinstance(self.tasks, tuple):
            raise TypeError(f"Roles: tasks: found {shown(self.tasks)}, expected a tuple of names.")
        check_dtype("Roles: dtype", self.dtype)
        _check_together(columns)

    def __len__(self) -> int:
        return self.task.shape[0]

    @cached_property
    def _means(self) -> Tensor:
        """`mean_weights` of retain and of forget rows, `[2, R]`: what most methods begin with, more than once."""
        # RETAIN is 0, FORGET 1
        chosen = self.kind == torch.arange(2, device=self.kind.device)[:, None]
        counted = chosen.clone()
        counted[FORGET].logical_or_(self.kind == RESTING)
        return _shares(self, chosen, counted)


def _check_column(name: str, column: object) -> None:
    if not isinstance(column, Tensor):
        raise TypeError(f"Roles: {name}: found {type(column).__name__}, expected a tensor [R].")
    check_dense(f"Roles: {name}", column, meta=True)  # of shapes alone
    if column.is_complex():
        raise TypeError(f"Roles: {name}: found {column.dtype}, expected real numbers.")


def _check_together(columns: dict[str, Tensor]) -> None:
    """The columns are vectors of one length on one device, whole numbers but for the loss."""
    shapes = {name: tuple(column.shape) for name, column in columns.items()}
    if columns["task"].ndim != 1 or len(set(shapes.values())) != 1:
        raise ValueError(
            f"Roles: shapes are {shapes}, expected vectors [R] of one length, an entry per row."
        )
    device = columns["task"].device
    for name, column in columns.items():
        if column.device != device:
            raise ValueError(
                f"Roles: {name} is on {column.device}, task on {device}; move them to one device."
            )
        if name != "loss" and column.dtype != torch.int64:
            raise TypeError(
                f"Roles: {name} is {column.dtype}, expected torch.int64; convert it by .long()."
            )


def check_roles(roles: object) -> None:
    """These are roles.

    Raises:
        TypeError: they are something else.
    """
    if not isinstance(roles, Roles):
        raise TypeError(
            f"roles: found {type(roles).__name__}, expected the roles of rows, rows.roles."
        )


def mean_weights(roles: Roles, kind: int | None) -> Tensor:
    """Weights 1 / count of the rows of `kind` in the row's task, else 0: J^T w is the sum of the tasks' means.

    Forget rows are counted with those that rest: 1 / n_t for each that is left, of n_t.

    Args:
        roles: roles of R rows.
        kind: one of the five; None for retain and forget rows together.

    Returns:
        Weights [R], float64, on the device of the roles.

    Raises:
        ValueError: `kind` is none of these.
    """
    check_roles(roles)
    known = isinstance(kind, int) and not isinstance(kind, bool) and kind in range(5)
    if kind is not None and not known:
        raise ValueError(
            f"mean_weights: kind: found {shown(kind)}, expected RETAIN (0), FORGET (1), SUBSPACE (2), RESTING (3), "
            "MEMORY (4) or None."
        )
    chosen = roles.kind <= FORGET if kind is None else roles.kind == kind
    counted = chosen
    if kind in (FORGET, RESTING, None):
        counted = chosen | (roles.kind == RESTING)
    return _shares(roles, chosen, counted)


def _shares(roles: Roles, chosen: Tensor, counted: Tensor) -> Tensor:
    """1 / count of the rows counted in a row's task where it is chosen, else 0: masks [..., R] -> float64."""
    if len(roles.tasks) == 1:
        return chosen.double() / counted.sum(-1, keepdim=True).clamp_(min=1)
    count = counted.new_zeros(*counted.shape[:-1], len(roles.tasks), dtype=torch.float64)
    count = count.index_add_(-1, roles.task, counted.double())
    # a task without such rows has weights of 0, not 0/0
    return chosen.double() / count.clamp_(min=1.0)[..., roles.task]


def retain_and_forget(roles: Roles) -> tuple[Tensor, Tensor]:
    """The mean weights [R] of retain rows and of forget rows, made once for all who ask: not to be written to."""
    check_roles(roles)
    r, f = roles._means.unbind()
    return r, f


def retain_less_forget(roles: Roles, alpha: float) -> Tensor:
    """alpha r - (1 - alpha) f [R]: weights of the mean retain gradient less those of the mean forget gradient."""
    r, f = retain_and_forget(roles)
    return torch.sub(alpha * r, f, alpha=1.0 - alpha)


def signs(roles: Roles) -> Tensor:
    """1 on retain rows, -1 on forget rows, 0 on all others: [R] float64."""
    check_roles(roles)
    return (roles.kind == RETAIN).double() - (roles.kind == FORGET).double()


def equal_shares(roles: Roles) -> Tensor:
    """1/T on retain and -1/T on forget rows, T of them in all, 0 on all others: [R] float64."""
    sign = signs(roles)
    return sign / sign.abs().sum().clamp(min=1.0)
