"""Checks of the arguments of methods; each names the method, the argument, what was found and expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtu_fast.methods.roles import Roles


def check_number(method: str, name: str, value: Any, expected: str) -> None:
    """The `value` is a real number.

    Raises:
        TypeError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = f"{value!r} ({type(value).__name__})"
        raise TypeError(f"{method}: {name} is {found}, expected {expected}.")


def check_fraction(method: str, name: str, value: Any) -> None:
    """The `value` is a share of the retain gradient, in [0, 1].

    Raises:
        ValueError: it is outside [0, 1] or not finite; a TypeError where it is no number.
    """
    check_number(method, name, value, "a number in [0, 1]")
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{method}: {name} is {value}, expected a number in [0, 1]: {name} weighs the retain gradient, "
            f"1 - {name} the forget gradient. Change the speed by the learning rate, not by {name}."
        )


def check_at_least_zero(method: str, name: str, value: Any, advice: str = "") -> None:
    """The `value` is a finite number of at least 0.

    Raises:
        ValueError: it is negative or not finite; a TypeError where it is no number.
    """
    check_number(method, name, value, "a number of at least 0")
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(
            f"{method}: {name} is {value}, expected a finite number of at least 0{advice}."
        )


def check_one_of(method: str, name: str, value: Any, known: Sequence[str], why: str = "") -> None:
    """The `value` is one of the known names.

    Raises:
        ValueError: it is not.
    """
    if value not in known:
        named = ", ".join(map(repr, known))
        raise ValueError(f"{method}: {name} is {value!r}, expected one of {named}{why}.")


def check_granularity(method: str, value: Any) -> None:
    """The `value` names a granularity; anything else is a ValueError."""
    why = ": 'global' is the papers' formula, the others solve for each layer or tensor on its own"
    check_one_of(method, "granularity", value, ("global", "layer", "tensor"), why)


def check_generator(method: str, value: Any) -> None:
    """The `value` is a generator of random numbers, or None.

    Raises:
        TypeError: it is neither.
    """
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"{method}: generator is {type(value).__name__}, expected a torch.Generator or None; "
            "for a seed pass torch.Generator().manual_seed(seed)."
        )


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
