"""Levelled OrthoGrad on explicit gradient rows: who is still to be forgotten, and QR on two sets of constraints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtu_fast.reference.base import Pair, Reference, Rows, Sides
from mtu_fast.reference.mean import mean
from mtu_fast.reference.orthograd import independent, project_out


def levelled_orthograd(
    retain: Rows, forget: Rows, loss: Rows, memory: Tensor, alpha: float = 0.5, *,
    tau: Mapping[str, float], kappa: Mapping[str, float], resting: Collection[str] = (),
    tol: float = 1e-7, faded: float = 1e-2,
) -> Tensor:  # fmt: skip
    """Direction alpha · r − (1 − alpha) · (f − x), x the projection of f on the span of retain and memory rows.

    Args:
        retain: {task: [k, P]} gradients of this step to be protected; r is their mean per task,
            summed over tasks.
        forget: {task: [m, P]} gradients to be ascended; f likewise, with zero for the rows that are
            forgotten.
        loss: {task: [m]}, the losses of the forget rows.
        memory: [K, P] gradients of retained samples from earlier steps.
        alpha: weight of the retain gradient.
        tau: {task: held-out loss}, at kappa times which a row is forgotten.
        kappa: {task: factor}; 1 where a task is left out.
        resting: tasks whose score says that they are forgotten.
        tol: length of a unit row's residual below which a retain row is dependent.
        faded: the same for a memory row, on the step's rows and on memory rows taken before it.

    Returns:
        The update direction [P].

    Source: ours.
    """
    left = {}
    for task, rows in forget.items():
        # a row is forgotten once its loss has reached κ τ
        still = loss[task] < kappa.get(task, 1.0) * tau[task] if len(rows) else loss[task] < 0
        if task in resting:
            still = torch.zeros_like(still)
        left[task] = rows * still[:, None]
    f = mean(left)
    b = across(f, torch.cat(list(retain.values())), memory, tol, faded)
    return alpha * mean(retain) - (1.0 - alpha) * b


def across(g: Tensor, rows: Tensor, memory: Tensor, tol: float, faded: float) -> Tensor:
    """The residual of g on the span of rows [k, P] and of what they leave of memory rows [K, P]."""
    basis = rows[independent(rows, tol)]
    # what the step's rows leave of each memory row
    rest = torch.stack([project_out(m, basis, tol) for m in memory]) if len(memory) else memory
    # a memory row nearly in their span says nothing more, and noise a lot
    alive = rest.norm(dim=1) > faded * memory.norm(dim=1)
    rest = rest[alive]
    rest = rest[independent(rest, faded)]
    return project_out(project_out(g, basis, tol), rest, tol)


@dataclass(frozen=True)
class LevelledOrthoGrad(Reference, called="levelled_orthograd"):
    """`levelled_orthograd` of the two sides; the kept rows of `subspace=` are the memory."""

    alpha: float = 0.5
    tau: Mapping[str, float] = field(default_factory=dict)
    kappa: Mapping[str, float] = field(default_factory=dict)
    resting: Collection[str] = ()
    tol: float = 1e-6

    def direction(self, sides: Sides) -> Tensor:
        kept = sides.subspace
        if kept is None:
            kept = torch.cat(list(sides.retain.values()))[:0]
        tau = {task: self.tau.get(task, torch.inf) for task in sides.forget}
        return levelled_orthograd(
            sides.retain, sides.forget, sides.forget_loss, kept, self.alpha,
            tau=tau, kappa=self.kappa, resting=self.resting, tol=self.tol,
        )  # fmt: skip

    def outside(self, sides: Sides, task: str) -> Pair:
        return self.alpha, 1.0 - self.alpha
