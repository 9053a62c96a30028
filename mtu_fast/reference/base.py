"""The contract of references: the rows a direction is made of, and `Reference`, which registers each by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mtu_fast._arguments import is_one_of, shown
from mtu_fast.reference._options import check_option

Rows = Mapping[str, Tensor]
Pair = tuple[float | Tensor, float | Tensor]


@dataclass(frozen=True)
class Sides:
    """Explicit gradient rows, told apart by role and task.

    Attributes:
        retain: {task: [k, P]}, k ≥ 0 rows for every task.
        forget: {task: [m, P]}, likewise.
        retain_loss: {task: [k]}, the detached losses of the retain rows.
        forget_loss: {task: [m]}, of the forget rows.
        subspace: [K, P], rows of earlier batches; None where none are kept.
    """

    retain: dict[str, Tensor]
    forget: dict[str, Tensor]
    retain_loss: dict[str, Tensor]
    forget_loss: dict[str, Tensor]
    subspace: Tensor | None = None

    def signed_means(self) -> dict[tuple[str, str], Tensor]:
        """{("retain" or "forget", task): [P]}: mean gradients, a forget row negated, task by task, retain first."""
        found = {}
        for task in self.retain:
            if len(self.retain[task]):
                found["retain", task] = self.retain[task].mean(0)
            if len(self.forget[task]):
                # negated: every row is one to descend on
                found["forget", task] = -self.forget[task].mean(0)
        return found

    def signed_matrix(self) -> Tensor:
        """The signed means as rows [R, P]; [0, P] without any."""
        means = self.signed_means()
        if means:
            return torch.stack(list(means.values()))
        return next(iter(self.retain.values()))[:0]


class Reference(ABC):
    """d = direction(sides): a method straight from its paper's formula, on explicit gradient rows.

    A frozen dataclass whose fields are its options, all with defaults:

        @dataclass(frozen=True)
        class Mine(Reference, called="mine"):
            alpha: float = 0.5

            def direction(self, sides): ...
    """

    def __init_subclass__(cls, called: str) -> None:
        super().__init_subclass__()
        if called in METHODS:
            known = METHODS[called].__module__
            raise ValueError(f"two references for {called}: {known}, {cls.__module__}")
        METHODS[called] = cls

    def __post_init__(self) -> None:
        if not type(self).__module__.startswith(__package__):
            return  # of somebody else's, who names options as they like
        for name in self.options():
            check_option(type(self).__name__, name, getattr(self, name))

    @classmethod
    def options(cls) -> list[str]:
        """Names of the options."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]

    @abstractmethod
    def direction(self, sides: Sides) -> Tensor:
        """The update direction [P]."""

    def outside(self, sides: Sides, task: str) -> Pair:
        """(up, down): what the losses of a task weigh for parameters outside.

        These get the gradient of Σ_task up · mean retain loss − down · mean forget loss. The rows
        of `sides` have no columns.
        """
        return 1.0, 1.0


METHODS: dict[str, type[Reference]] = {}


def even(sides: Sides) -> Pair:
    """1/T for parameters outside, T the number of signed mean rows."""
    share = 1.0 / max(len(sides.signed_means()), 1)
    return share, share


def made(name: str, options: Mapping[str, Any]) -> Reference:
    """The method of this name with these options, the others at their defaults.

    Args:
        name: as registered.
        options: keyword options given by the caller.

    Returns:
        The method.

    Raises:
        ValueError: no method has this name.
        TypeError: the method has no such option.
    """
    if not is_one_of(name, METHODS):
        raise ValueError(
            f"reference.backward: method is {shown(name)}, expected one of {', '.join(sorted(METHODS))}."
        )
    known = METHODS[name].options()
    unknown = sorted(set(options) - set(known))
    if unknown:
        wanted = ", ".join(known) or "none"
        raise TypeError(
            f"reference.backward: {name!r} has no option {', '.join(unknown)}; its options are: {wanted}."
        )
    return METHODS[name](**options)
