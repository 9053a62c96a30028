"""What references share: the rows a direction is made of, and the registry.

A reference is a function `(sides, **options) -> d [P]`; a file of this folder registers its own,
and importing the package imports them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

Rows = Mapping[str, Tensor]
Direction = Callable[..., Tensor]
Pair = tuple[float | Tensor, float | Tensor]
Outside = Pair | Callable[..., Pair]


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

    retain: Rows
    forget: Rows
    retain_loss: Rows
    forget_loss: Rows
    subspace: Tensor | None = None

    def signed_means(self) -> dict[tuple[str, str], Tensor]:
        """{("retain" or "forget", task): [P]}: mean gradients, a forget row negated, task by task, retain first."""
        found = {}
        for task in self.retain:
            for kind, sign, rows in (
                ("retain", 1.0, self.retain[task]),
                ("forget", -1.0, self.forget[task]),
            ):
                if len(rows):
                    found[kind, task] = sign * rows.mean(0)
        return found

    def signed_matrix(self) -> Tensor:
        """The signed means as rows [R, P]; [0, P] without any."""
        empty = [next(iter(self.retain.values()))[:0]] if self.retain else []
        return torch.cat(empty + [g[None] for g in self.signed_means().values()])


@dataclass(frozen=True)
class Reference:
    """A registered method.

    Attributes:
        direction: (sides, **options) -> [P].
        outside: (up, down): parameters outside get the gradient of Σ_task up · mean retain loss −
            down · mean forget loss; or a function `(sides, task, **options)` that returns the pair,
            of sides whose rows have no columns.
        options: names and defaults of the direction's keyword options.
    """

    direction: Direction
    outside: Outside
    options: Mapping[str, Any]

    def pair(self, sides: Sides, task: str, options: Mapping[str, Any]) -> Pair:
        """What `outside` says of a task."""
        return self.outside(sides, task, **options) if callable(self.outside) else self.outside


def even(sides: Sides, task: str, **options: Any) -> Pair:
    """1/T for parameters outside, T the number of signed mean rows."""
    share = 1.0 / max(len(sides.signed_means()), 1)
    return share, share


METHODS: dict[str, Reference] = {}


def reference(name: str, outside: Outside = (1.0, 1.0)) -> Callable[[Direction], Direction]:
    """Register a direction under this name, with what parameters outside get (see `Reference`)."""

    def register(direction: Direction) -> Direction:
        if name in METHODS:
            raise ValueError(
                f"two references for {name}: {METHODS[name].direction.__module__}, {direction.__module__}"
            )
        named = [
            p
            for p in list(signature(direction).parameters.values())[1:]
            if p.default is not Parameter.empty
        ]
        METHODS[name] = Reference(direction, outside, {p.name: p.default for p in named})
        return direction

    return register


def find(name: str, options: Mapping[str, Any]) -> tuple[Reference, dict[str, Any]]:
    """The method of this name, and its options with the defaults filled in.

    Args:
        name: as registered.
        options: keyword options given by the caller.

    Returns:
        The registered method and all its options.

    Raises:
        ValueError: no method has this name.
        TypeError: the method has no such option.
    """
    if name not in METHODS:
        raise ValueError(
            f"reference.backward: method is {name!r}, expected one of {', '.join(sorted(METHODS))}."
        )
    found = METHODS[name]
    unknown = sorted(set(options) - set(found.options))
    if unknown:
        wanted = ", ".join(found.options) or "none"
        raise TypeError(
            f"reference.backward: {name!r} has no option {', '.join(unknown)}; its options are: {wanted}."
        )
    return found, {**found.options, **options}
