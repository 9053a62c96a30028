"""What the options of references must be, by their names, which mean the same in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mtu_fast._arguments import (
    check_mapping,
    check_number,
    check_one_of,
    check_positive,
    check_real,
    check_share,
    check_whole,
    names,
    shown,
)

Check = Callable[[str, Any], None]
ORDERS = ("joint", "project-first", "orthogonalize-first")


def check_option(method: str, name: str, value: Any) -> None:
    """The option is of its kind; of a name that is known to no check, anything is.

    Args:
        method: whose option it is, for the error.
        name: of the option.
        value: what was given.

    Raises:
        TypeError: of another kind.
        ValueError: out of range.
    """
    if name in CHECKS:
        CHECKS[name](f"{method}: {name}", value)


def _fraction(name: str, value: Any) -> None:
    check_real(name, value, "a number in [0, 1]")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: found {shown(value)}, expected a number in [0, 1].")


def _at_least_zero(name: str, value: Any) -> None:
    check_positive(name, value, zero=True)


def _tolerance(name: str, value: Any) -> None:
    _at_least_zero(name, value)
    if value >= 1:
        raise ValueError(f"{name}: found {shown(value)}, expected less than 1, of a unit row.")


def _rank(name: str, value: Any) -> None:
    if value is not None:
        check_whole(name, value, 1)


def _targets(name: str, value: Any) -> None:
    """Names of tasks, or of GradVac {pair of rows: cosine}."""
    if isinstance(value, Mapping):
        for pair, cosine in value.items():
            check_number(f"{name}[{pair!r}]", cosine)
    elif value is not None:
        names(name, value)


def _collection(name: str, value: Any) -> None:
    if value:
        names(name, value)


def _by_task(check: Check, none: bool) -> Check:
    """{task: value}, each value as `check` wants it; None where that is allowed."""

    def checked(name: str, given: Any) -> None:
        if given is None and none:
            return
        for task, value in check_mapping(name, given).items():
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            check(f"{name}[{task!r}]", number)

    return checked


def _orders(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: found {shown(value)}, expected a list of orders, one per row.")
    for order in value:
        if isinstance(order, str) or not isinstance(order, Sequence):
            raise TypeError(f"{name}: found {shown(order)}, expected whole numbers of rows.")
        for row in order:
            check_whole(name, row, 0)


def _order(name: str, value: Any) -> None:
    check_one_of(name, value, ORDERS)


CHECKS: dict[str, Check] = {
    "a": check_positive,
    "alpha": _fraction,
    "beta": _fraction,
    "c": _at_least_zero,
    "energy": check_share,
    "kappa": _by_task(_at_least_zero, none=False),
    "order": _order,
    "orders": _orders,
    "preference": _by_task(_at_least_zero, none=True),
    "rank": _rank,
    "resting": _collection,
    "ridge": _at_least_zero,
    "slope": _at_least_zero,
    "targets": _targets,
    "tau": _by_task(check_number, none=False),
    "threshold": check_number,
    "tol": _tolerance,
}
