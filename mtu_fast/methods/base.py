"""What every method shares: the roles of the rows, the protocol, means per (kind, task), argument checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mtu_fast._ops.gram_schmidt import TOLERANCE, solve

RETAIN, FORGET, SUBSPACE = 0, 1, 2

GRANULARITY = ("global", "layer", "tensor")


@dataclass(frozen=True)
class Roles:
    """What row r is: kind[r] of task tasks[task[r]], sample[r] of its forward, with loss value loss[r].

    Attributes:
        task: [R] int64, index into `tasks`.
        sample: [R] int64, index of the sample within its forward; -1 where the row is a mean.
        kind: [R] int64, RETAIN, FORGET or SUBSPACE.
        loss: [R] float64, detached loss values.
        tasks: names of the tasks.
        dtype: the precision in which the rows' gradients were computed.

    Raises:
        ValueError: the four tensors are not vectors of one length.
        TypeError: `task`, `sample` or `kind` is not int64.
    """

    task: Tensor
    sample: Tensor
    kind: Tensor
    loss: Tensor
    tasks: tuple[str, ...]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        columns = {"task": self.task, "sample": self.sample, "kind": self.kind, "loss": self.loss}
        shapes = {name: tuple(column.shape) for name, column in columns.items()}
        if self.task.ndim != 1 or len(set(shapes.values())) != 1:
            raise ValueError(
                f"Roles: shapes are {shapes}, expected four vectors [R] of one length, an entry per row."
            )
        for name in ("task", "sample", "kind"):
            if columns[name].dtype != torch.int64:
                raise TypeError(
                    f"Roles: {name} is {columns[name].dtype}, expected torch.int64; convert it by .long()."
                )

    def __len__(self) -> int:
        return self.task.shape[0]


@runtime_checkable
class Method(Protocol):
    """w = method(G, roles): weights of the rows, from nothing but their Gram matrix and their roles.

    per: "sample" or "task", the rows the method is meant for. granularity: "global", "layer" or
    "tensor", the blocks of parameters that each get a Gram matrix and weights of their own.
    needs_gram: False where w does not depend on G, which is then None.
    """

    per: str = "sample"
    granularity: str = "global"
    needs_gram: bool = True

    def __call__(self, G: Any, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R] float64."""
        ...

    def outside(self, roles: Roles) -> Tensor:
        """Weights [R] float64 of the losses for parameters outside the shared ones; equal within a (kind, task).

        Asked for only where there are such parameters.
        """
        raise NotImplementedError(
            f"{type(self).__name__}.outside(roles): expected weights [R] of the losses for the parameters outside "
            "`params`, equal within each (kind, task): the weights before surgery, say."
        )


@dataclass(frozen=True)
class Constraint:
    """`J_a d = 0` for the part `d = Jᵀ part` of an update, and how to bring what is left of `J_a d` there.

    Attributes:
        part: weights of d, [..., R].
        active: the rows a, [R] bool.
        gram: Gram matrix of the active rows as a correction sees them, [..., R, R], zeros
            elsewhere.
        tol: what `dependence_tolerance` gives for the rows.
        lift: a correction has the weights `lift x` with `gram x = J_a d`, [..., R, R]; None where
            they are x.
    """

    part: Tensor
    active: Tensor
    gram: Tensor
    tol: float
    lift: Tensor | None = None

    def correction(self, Jd: Tensor) -> Tensor:
        """Weights [..., R] of what is to be subtracted from d, given J d [..., R]."""
        x, _ = solve(self.gram, Jd, self.active, self.tol)
        return x if self.lift is None else (self.lift @ x[..., None]).squeeze(-1)


@runtime_checkable
class Constrained(Protocol):
    """What a method may have besides `Method`, to be refined where the Gram's products are rounded below float64."""

    def constraint(self, G: Any, roles: Roles, w: Tensor) -> Constraint | None:
        """What must hold of the update `Jᵀ w`, w = method(G, roles); None where nothing holds exactly."""
        ...


def mean_weights(roles: Roles, kind: int | None) -> Tensor:
    """Weights 1 / count of the rows of `kind` in the row's task, else 0: J^T w is the sum of the tasks' means.

    Args:
        roles: roles of R rows.
        kind: RETAIN, FORGET or SUBSPACE; None for retain and forget rows together.

    Returns:
        Weights [R], float64, on the device of the roles.

    Raises:
        ValueError: `kind` is none of these.
    """
    if kind not in (RETAIN, FORGET, SUBSPACE, None):
        raise ValueError(
            f"mean_weights: kind is {kind!r}, expected RETAIN (0), FORGET (1), SUBSPACE (2) or None."
        )
    chosen = roles.kind != SUBSPACE if kind is None else roles.kind == kind
    member = chosen.to(torch.float64)
    count = member.new_zeros(len(roles.tasks)).index_add(0, roles.task, member)
    return member / count[roles.task].clamp(min=1.0)


def dependence_tolerance(dtype: torch.dtype) -> float:
    """Equilibrated residual norm below which a row counts as dependent on the others.

    Args:
        dtype: the precision in which the rows were computed.

    Returns:
        The length `mtu_fast._ops.gram_schmidt.TOLERANCE` holds for the dtype: 1e-6 for float32,
        1e-7 for float64.

    Raises:
        TypeError: `dtype` is none of these.
    """
    if dtype not in TOLERANCE:
        raise TypeError(
            f"rows are {dtype}, expected one of {', '.join(map(str, TOLERANCE))}; convert the losses."
        )
    return TOLERANCE[dtype]


def check_fraction(method: str, name: str, value: Any) -> float:
    """The `value` as a float in [0, 1].

    Raises:
        TypeError: it is not a real number.
        ValueError: it is outside [0, 1] or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{method}: {name} is {value!r} ({type(value).__name__}), expected a number in [0, 1]."
        )
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise ValueError(
            f"{method}: {name} is {value}, expected a number in [0, 1]: {name} weighs the retain gradient, "
            f"1 - {name} the forget gradient. Change the speed by the learning rate, not by {name}."
        )
    return float(value)


def check_granularity(method: str, value: Any) -> str:
    """The `value` if it names a granularity.

    Raises:
        ValueError: it does not.
    """
    if value not in GRANULARITY:
        raise ValueError(
            f"{method}: granularity is {value!r}, expected one of {', '.join(map(repr, GRANULARITY))}: "
            "'global' is the papers' formula, the others solve for each layer or tensor on its own."
        )
    return str(value)


def check_gram(method: str, G: Tensor, roles: Roles) -> Tensor:
    """G in float64, [..., R, R].

    Raises:
        TypeError: `G` is not a real floating tensor.
        ValueError: its shape does not fit the roles.
    """
    if not isinstance(G, Tensor) or not G.is_floating_point():
        found = G.dtype if isinstance(G, Tensor) else type(G).__name__
        raise TypeError(
            f"{method}: G is {found}, expected a float64 tensor [..., R, R]; rows.gram() gives it."
        )
    R = len(roles)
    if G.ndim < 2 or tuple(G.shape[-2:]) != (R, R):
        raise ValueError(
            f"{method}: G has shape {tuple(G.shape)}, expected [..., {R}, {R}] for {R} rows; "
            "take both from the same rows: method(rows.gram(), rows.roles)."
        )
    return G.to(torch.float64)
