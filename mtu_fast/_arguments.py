"""Checks of plain arguments, alike for all of the package: whole numbers, shares, names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def check_whole(name: str, value: Any, least: int) -> None:
    """`value` is a whole number of at least `least`.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is below.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: found {value!r}, expected a whole number.")
    if value < least:
        raise ValueError(f"{name}: found {value}, expected at least {least}.")


def check_share(name: str, value: Any) -> None:
    """`value` is a number in (0, 1].

    Raises:
        TypeError: it is no number.
        ValueError: it is outside.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: found {value!r}, expected a number in (0, 1].")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name}: found {value!r}, expected a share in (0, 1].")


def names(name: str, value: Any) -> tuple[str, ...]:
    """Several names.

    Raises:
        TypeError: one string, which would be read as its letters, or no collection.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: found {value!r}, expected several names, for example ('a',).")
    return tuple(value)
