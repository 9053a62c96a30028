"""The contract of methods: `Method`, what it declares, and how a run on disk knows one from another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from mtu_fast._arguments import check_mapping, is_one_of, shown
from mtu_fast._ops.gram_schmidt import TOLERANCE, solve
from mtu_fast.methods._identity import identity
from mtu_fast.methods.roles import (
    FORGET,
    MEMORY,
    RESTING,
    RETAIN,
    SUBSPACE,
    Roles,
    mean_weights,
)

__all__ = [
    "FORGET",
    "MEMORY",
    "RESTING",
    "RETAIN",
    "SUBSPACE",
    "Constraint",
    "Granularity",
    "Method",
    "Per",
    "Roles",
    "Scheduled",
    "dependence_tolerance",
    "mean_weights",
]

Per = Literal["sample", "task"]
Granularity = Literal["global", "layer", "tensor"]

HOW_TO_WRITE_ONE = (
    "A map from G alone is used as rows.backward(weighting(rows.gram())). A method of your own derives from "
    "mtu.Method:\n\n"
    "    @dataclass(frozen=True)\n"
    "    class Mine(mtu.Method):\n"
    "        alpha: float = 0.5\n"
    "        per = 'sample'  # or 'task', for one mean row per (role, task)\n\n"
    "        def __call__(self, G, roles):  # [R, R] -> [R]\n"
    "            return self.alpha * (roles.kind == mtu.RETAIN).double() / len(roles)\n"
)


class Method(ABC):
    """w = method(G, roles): weights of the rows, from nothing but their Gram matrix and their roles.

    A method of your own is a frozen dataclass. What it depends on are its fields: they make its
    `repr`, its equality, and the description by which a checkpoint knows it.

        @dataclass(frozen=True)
        class Mine(mtu.Method):
            alpha: float = 0.5

            def __call__(self, G, roles):  # float64 [..., R, R] -> [..., R]
                r = mtu.methods.mean_weights(roles, mtu.RETAIN)
                f = mtu.methods.mean_weights(roles, mtu.FORGET)
                return self.alpha * r - (1 - self.alpha) * f

    Attributes:
        per: the rows the method is meant for: "sample", or "task" for one mean row per (kind,
            task).
        granularity: the blocks of parameters that each get a Gram matrix and weights of their own:
            "global" (one block), "layer" or "tensor". May be a field.
        needs_gram: False where w does not depend on G, which is then None.
        needs_subspace: whether the method works in a `mtu.Subspace`, which it must then be given.
        takes_memory: whether the rows of a `mtu.Memory` are constraints of the method.
        needs_memory: whether it must be given one.
        needs_levels: whether it is meant for forget rows of which `mtu.Levels` says who rests.
        allows_absent: whether rows of kind ABSENT do it no harm. Where a mask `present` lies on a
            GPU, such a method is given a row of zeros for a sample without a label; for another one
            the GPU is waited for, and the row left out.
        averages_forget: whether forget rows enter by nothing but their mean, task by task: w is the
            same, up to rounding, where the method sees that mean as one row, whose weight is then
            divided evenly. Of many rows they are summed before products are taken (`Update.seen`).
        scale_equivariant: whether losses times S make the update S times as long; a loss scaler,
            which divides `.grad` by S, spoils it where not.
    """

    per: ClassVar[Per] = "sample"
    granularity: Granularity = "global"
    needs_gram: ClassVar[bool] = True
    needs_subspace: ClassVar[bool] = False
    takes_memory: ClassVar[bool] = False
    needs_memory: ClassVar[bool] = False
    needs_levels: ClassVar[bool] = False
    allows_absent: ClassVar[bool] = False
    averages_forget: ClassVar[bool] = False
    scale_equivariant: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, G: Any, roles: Roles) -> Tensor:
        """Weights [..., R] float64 from the Gram matrix [..., R, R] float64."""

    def outside(self, roles: Roles) -> Tensor:
        """Weights [R] of the losses for parameters outside the shared ones, equal within each (kind, task).

        Asked for only where there are such parameters, and then before the weights of the rows: an
        ordinary backward of the losses under these weights needs no Gram matrix. It changes nothing
        of the method. Without a Gram matrix they are the weights themselves.

        Raises:
            NotImplementedError: the method needs a Gram matrix and does not say.
        """
        if not self.needs_gram:
            return self(None, roles)
        name = type(self).__name__
        raise NotImplementedError(
            f"{name}.outside(roles): expected weights [R] of the losses for the parameters outside "
            "`params`, equal within each (kind, task): for example the weights before surgery."
        )

    def constraint(self, G: Any, roles: Roles, w: Tensor) -> Constraint | None:
        """What must hold of the update `Jᵀ w`, w = method(G, roles); None where nothing holds exactly.

        Asked for where the Gram's products are rounded below float64, to refine the update.
        """
        return None

    def generators(self) -> list[torch.Generator]:
        """What a call draws random numbers from; a checkpoint of `mtu.unlearn` holds where they stand."""
        held = vars(self).values()
        return [value for value in held if isinstance(value, torch.Generator)]

    def state_dict(self) -> Mapping[str, Any]:
        """What calls and hooks have changed: tensors, numbers and strings; nothing by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; anything but a mapping is a TypeError."""
        if check_mapping("state", state, "what state_dict() gave"):
            name = type(self).__name__
            raise NotImplementedError(f"{name}: found a state, but no load_state_dict to take it.")

    def describe(self) -> dict[str, Any]:
        """The type and the fields, as text and numbers: by this a checkpoint tells one method from another.

        Fields with `compare=False` are left out, as they are from `==`. Where the fields do not say
        all that the method depends on, a TypeError says what to do.
        """
        return identity(self)


class Scheduled(Method):
    """A method whose weights depend on how far a run has come; `mtu.unlearn` calls its hooks.

    In a frozen dataclass, what the hooks change lies in an object that a field with `init=False,
    repr=False, compare=False` holds.

    Attributes:
        epoch_of: "forget" or "retain", the loader whose passes are the epochs.
    """

    epoch_of: ClassVar[Literal["forget", "retain"]] = "retain"

    @property
    @abstractmethod
    def epochs(self) -> int | None:
        """How many epochs the method wants, known after `prepare`; None for any number.

        Where it wants a number the held-out level does not stop the run.
        """

    @abstractmethod
    def prepare(
        self, *, forget: int, retain: int, forget_batches: int, retain_batches: int
    ) -> None:
        """Once, before the first step: samples of each side, and batches of one pass over it."""

    @abstractmethod
    def start_epoch(self, epoch: int, validation: Callable[[], Mapping[str, float]]) -> None:
        """Before every epoch, counted from 0; `validation()` measures {task: mean validation loss} when called."""

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any]:
        """All that the hooks have set: tensors, numbers and strings."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


@dataclass(frozen=True)
class Constraint:
    """`J_a d = 0` for the part `d = Jᵀ part` of an update, and how to bring what is left of `J_a d` there.

    Attributes:
        part: weights of d, [..., R].
        active: the rows a, [R] bool.
        gram: Gram matrix of the active rows as a correction sees them, [..., R, R]; elsewhere it is
            not read.
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
        # x = G_AA⁺ J_A d: what is subtracted has the same J_A as d has
        x, _ = solve(self.gram, Jd, self.active, self.tol)
        if self.lift is None:
            return x
        return (self.lift @ x[..., None]).squeeze(-1)


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
    if not isinstance(dtype, torch.dtype) or dtype not in TOLERANCE:
        known = ", ".join(map(str, TOLERANCE))
        raise TypeError(
            f"dtype: rows are {shown(dtype)}, expected one of {known}; convert the losses."
        )
    return TOLERANCE[dtype]


def has_constraint(method: Method) -> bool:
    """Whether something may hold of its updates exactly."""
    return type(method).constraint is not Method.constraint


def has_default_outside(method: Method) -> bool:
    """Whether parameters outside get the weights themselves, where the method needs no Gram matrix."""
    return type(method).outside is Method.outside


KNOWN = {"per": get_args(Per), "granularity": get_args(Granularity)}


def check_flags(method: Method) -> None:
    """What a method says of itself is one of the known words.

    Raises:
        TypeError: it is not.
    """
    for name, words in KNOWN.items():
        value = getattr(method, name)
        if not is_one_of(value, words):
            expected = ", ".join(map(repr, words))
            raise TypeError(
                f"{type(method).__name__}: {name} is {value!r}, expected one of {expected}."
            )
