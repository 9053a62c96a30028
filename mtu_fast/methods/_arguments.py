"""Checks of the arguments of methods; each names the method, the argument, what was found and expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtu_fast._arguments import check_dense, check_one_of, check_real, shown
from mtu_fast.methods.roles import Roles, check_roles


def check_fraction(method: str, name: str, value: Any) -> None:
    """The `value` is a share of the retain gradient, in [0, 1].

    Raises:
        ValueError: it is outside [0, 1] or not finite; a TypeError where it is no number.
    """
    check_real(f"{method}: {name}", value, "a number in [0, 1]")
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{method}: {name}: found {shown(value)}, expected a number in [0, 1]: {name} weighs the retain gradient, "
            f"1 - {name} the forget gradient. Change the speed by the learning rate, not by {name}."
        )


def check_granularity(method: str, value: Any) -> None:
    """The `value` names a granularity; anything else is a ValueError."""
    why = ": 'global' is the papers' formula, the others solve for each layer or tensor on its own"
    check_one_of(f"{method}: granularity", value, ("global", "layer", "tensor"), why)


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
    check_roles(roles)
    check_dense(f"{method}: G", G, meta=True)  # of shapes alone
    if G.device != roles.task.device:
        raise ValueError(
            f"{method}: G is on {G.device}, roles on {roles.task.device}; move them to one device."
        )
    R = len(roles)
    if G.ndim < 2 or tuple(G.shape[-2:]) != (R, R):
        raise ValueError(
            f"{method}: G has shape {tuple(G.shape)}, expected [..., {R}, {R}] for {R} rows; "
            "take both from the same rows: method(rows.gram(), rows.roles)."
        )
    return G.to(torch.float64)
