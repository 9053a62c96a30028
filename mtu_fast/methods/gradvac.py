"""GradVac: raise every pair of rows to the similarity that it usually has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtu_fast._arguments import check_generator, check_real, held_in, shown
from mtu_fast.methods._gram import signed_gram
from mtu_fast.methods._orders import visiting_orders
from mtu_fast.methods.base import Method, dependence_tolerance
from mtu_fast.methods.roles import FORGET, Roles, signs


@dataclass(frozen=True)
class GradVac(Method):
    """w = Σ_i c_i: c_i = e_i, for every j ≠ i raised along g_j to the target φ̂_ij of the cosine φ of J^T c_i and g_j.

    if φ < φ̂: c_i[j] += ‖J^T c_i‖ (φ̂ √(1 - φ²) - φ √(1 - φ̂²)) / (‖g_j‖ √(1 - φ̂²)); then φ̂ +=
    beta (φ - φ̂).

    The targets φ̂_ij start at 0, where the first call is PCGrad, and follow the cosines that were
    met. They are kept by (kind, task) of both rows, so they survive rows in another order and steps
    in which a task is missing; rows of one (kind, task) share them and move them by their mean.
    Forget rows enter negated and their weights come back negated; subspace rows take no part. Zero
    rows, a c_i of which the dependence tolerance leaves nothing, and targets closer to 1 than that
    change nothing (our reading). A batch of matrices has targets of its own for each. Runs on the
    device of G without waiting for it. `state_dict` and `load_state_dict` keep the targets across
    runs.

    Args:
        beta: how fast targets follow, in [0, 1]; 0 leaves them at 0.
        generator: draws for every row i the order of its j, at each call; None for increasing j.
            One order serves all matrices of a batch.

    Raises:
        TypeError: `beta` is not a number, or `generator` is not a torch.Generator.
        ValueError: `beta` is outside [0, 1].

    Source: Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in
    Massively Multilingual Models", arXiv 2010.05874, algorithm 1.
    """

    beta: float = 0.01
    generator: torch.Generator | None = None
    _memory: _Memory = field(init=False, repr=False, compare=False)
    per = "task"

    def __post_init__(self) -> None:
        expected = "a number in [0, 1]"
        check_real("GradVac: beta", self.beta, expected)
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(
                f"GradVac: beta: found {shown(self.beta)}, expected {expected}: how far targets move a step."
            )
        check_generator("GradVac: generator", self.generator)
        object.__setattr__(self, "_memory", _Memory())

    def __call__(self, G: Tensor, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R]; moves the targets.

        A `G` that is no floating tensor is a TypeError; one whose size is not the number of rows in
        `roles`, or a batch of another shape than before, a ValueError.
        """
        G, sign = signed_gram("GradVac", G, roles)
        table = self._memory.table(G, roles.tasks)
        which = self._memory.memberships(roles)  # [R, 2 tasks]
        orders = visiting_orders(len(roles), self.generator).to(G.device)
        targets = which @ table @ which.t()
        C, met, seen = _vaccinate(G, targets, orders, dependence_tolerance(roles.dtype))
        count = which.t() @ seen @ which
        total = which.t() @ (met * seen) @ which
        # an exponential mean: a pair moves towards the mean of the cosines it has met
        moved = table + self.beta * (total / count.clamp(min=1.0) - table)
        self._memory.targets = torch.where(count > 0, moved, table)
        return sign * C.sum(-2)

    def outside(self, roles: Roles) -> Tensor:
        """Weights 1 on retain rows, -1 on forget rows, [R]: the weights where nothing is changed."""
        return signs(roles)

    def state_dict(self) -> dict[str, Any]:
        """Targets, the tasks they belong to, and the state of the generator."""
        state: dict[str, Any] = {
            "tasks": list(self._memory.tasks),
            "targets": None,
            "generator": None,
        }
        if self._memory.targets is not None:
            state["targets"] = self._memory.targets.clone()
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        held_in("GradVac: state", state, "tasks", "targets", "generator")
        tasks, targets = tuple(state["tasks"]), state["targets"]
        targets = None if targets is None else targets.clone()
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
        self._memory.tasks, self._memory.targets = tasks, targets


@dataclass
class _Memory:
    """The targets met so far.

    Attributes:
        tasks: those met, in the order in which they came.
        targets: [..., 2 tasks, 2 tasks], the retain and the forget row of each task; None before
            the first call.
    """

    tasks: tuple[str, ...] = ()
    targets: Tensor | None = None

    def table(self, G: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """The targets, grown by rows and columns of zeros for tasks not met before."""
        self.tasks = tuple(dict.fromkeys([*self.tasks, *tasks]))
        size = 2 * len(self.tasks)
        if self.targets is None:
            return G.new_zeros(*G.shape[:-2], size, size)
        if self.targets.shape[:-2] != G.shape[:-2]:
            raise ValueError(
                f"GradVac: G has the batch shape {tuple(G.shape[:-2])}, but the targets have "
                f"{tuple(self.targets.shape[:-2])} from the calls before; use one GradVac for each."
            )
        more = size - self.targets.shape[-1]
        return torch.nn.functional.pad(self.targets.to(G), (0, more, 0, more))

    def memberships(self, roles: Roles) -> Tensor:
        """1 where row r is of the entry's (kind, task), [R, 2 tasks] float64; only retain and forget rows are."""
        known = [self.tasks.index(task) for task in roles.tasks]
        place = torch.tensor(known, dtype=torch.int64, device=roles.task.device)
        entry = 2 * place[roles.task] + (roles.kind == FORGET).long()
        one_hot = torch.nn.functional.one_hot(entry, 2 * len(self.tasks)).double()
        return one_hot * (roles.kind <= FORGET)[:, None]


def _vaccinate(
    G: Tensor, targets: Tensor, orders: Tensor, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [..., R, R] of the changed rows, the cosines [..., R, R] met, and 1 where one was met.

    All rows i take their step at once; orders [R, R-1] holds whom each of them meets.
    """
    C = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand(G.shape)
    met = torch.zeros_like(G)
    seen = torch.zeros_like(G)
    square = G.diagonal(dim1=-2, dim2=-1)
    for j in orders.unbind(1):
        at = j[:, None].expand(*square.shape, 1)
        # rows i of C are coefficients of the changed rows, whose Gram is C G Cᵀ
        left = ((C @ G) * C).sum(-1)  # ‖J^T c_i‖²
        other = square[..., j]
        there = (left > tol**2 * square) & (other > 0)
        dot = (C * G[..., j, :]).sum(-1)
        cosine = torch.where(there, (dot / (left * other).sqrt()).clamp(-1.0, 1.0), 0.0)
        target = targets.gather(-1, at)[..., 0]
        sine = (1.0 - cosine**2).sqrt()
        wanted = (1.0 - target**2).clamp(min=0.0).sqrt()
        # the multiple of row j that brings the cosine to its target, by the law of sines
        step = (left / other).sqrt() * (target * sine / wanted - cosine)
        rise = there & (cosine < target) & (wanted > tol)
        C = C.scatter_add(-1, at, torch.where(rise, step, 0.0)[..., None])
        met = met.scatter(-1, at, cosine[..., None])
        seen = seen.scatter(-1, at, there[..., None].to(G))
    return C, met, seen
