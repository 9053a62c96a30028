"""Checks of the kinds of arguments, alike for all of the package; an error names the argument, and what was found."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST = 2**62  # a count beyond which nobody has counted
WIDEST = 60  # characters that an error shows of a value
T = TypeVar("T")


def shown(value: object) -> str:
    """What errors show of a value: its `repr`, cut where it is long, or its type where it has none."""
    try:
        text = repr(value)
    except Exception:  # of the caller's own class, or a number of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}…"


# ---- numbers -------------------------------------------------------------------------------------


def check_whole(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """`value` is a whole number of at least `least`, at most `most`.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is outside.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: found {shown(value)}, expected a whole number.")
    if value < least:
        raise ValueError(f"{name}: found {shown(value)}, expected at least {least}.")
    if value > most:
        raise ValueError(f"{name}: found {shown(value)}, expected at most {most}.")


def check_number(name: str, value: Any, expected: str = "a finite number") -> None:
    """`value` is a finite real number.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or too large to be one.
    """
    check_real(name, value, expected)
    if not _is_finite(value):
        raise ValueError(f"{name}: found {shown(value)}, expected {expected}.")


def check_real(name: str, value: Any, expected: str) -> None:
    """`value` is a real number.

    Raises:
        TypeError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{name}: found {shown(value)} ({type(value).__name__}), expected {expected}."
        )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def check_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """`value` is a finite number above 0, or 0 where `zero` says so.

    Raises:
        TypeError: it is no number.
        ValueError: it is below, or not finite.
    """
    expected = f"a finite number {'of at least' if zero else 'above'} 0"
    check_number(name, value, expected)
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name}: found {shown(value)}, expected {expected}.")


def check_share(name: str, value: Any) -> None:
    """`value` is a number in (0, 1].

    Raises:
        TypeError: it is no number.
        ValueError: it is outside.
    """
    check_real(name, value, "a number in (0, 1]")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name}: found {shown(value)}, expected a share in (0, 1].")


# ---- words and kinds -----------------------------------------------------------------------------


def check_flag(name: str, value: Any) -> None:
    """`value` is True or False.

    Raises:
        TypeError: it is something else, whose truth is nobody's intention.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: found {shown(value)}, expected True or False.")


def is_one_of(value: Any, known: Iterable[str]) -> bool:
    """Whether `value` is one of some words; of no array, whose comparison is one more array."""
    return isinstance(value, str) and value in known


def check_one_of(name: str, value: Any, known: Sequence[str], why: str = "") -> None:
    """`value` is one of the known words.

    Raises:
        ValueError: it is not.
    """
    if not is_one_of(value, known):
        words = ", ".join(map(repr, known))
        raise ValueError(f"{name}: found {shown(value)}, expected one of {words}{why}.")


def check_text(**values: object) -> None:
    """All are strings.

    Raises:
        TypeError: one is not.
    """
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"{name}: found {shown(value)}, expected a string.")


def names(name: str, value: Any) -> tuple[Any, ...]:
    """Several names.

    Raises:
        TypeError: one string, which would be read as its letters, or no collection of names.
        ValueError: none at all.
    """
    if isinstance(value, str | bytes | Tensor) or not isinstance(value, Iterable):
        raise TypeError(
            f"{name}: found {shown(value)}, expected several names, for example ('a',)."
        )
    found = tuple(value)
    odd = [one for one in found if isinstance(one, Tensor) or not isinstance(one, Hashable)]
    if odd:
        raise TypeError(f"{name}: found {shown(odd[0])} among the names, expected strings.")
    if not found:
        raise ValueError(f"{name}: found no name, expected at least one, or None.")
    return found


def check_dtype(name: str, value: Any) -> None:
    """`value` is a dtype of real floating numbers.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"{name}: found {shown(value)}, expected a real dtype as torch.float32.")


def check_generator(name: str, value: Any) -> None:
    """`value` is a generator of random numbers, or None.

    Raises:
        TypeError: it is neither.
    """
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"{name}: found {type(value).__name__}, expected a torch.Generator or None; for a seed pass "
            "torch.Generator().manual_seed(seed)."
        )


def check_function(name: str, value: object, takes: str) -> None:
    """`value` can be called.

    Args:
        name: of the argument.
        value: what was given.
        takes: what it is called with, for the error.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name}: found {type(value).__name__}, expected a function of ({takes}).")


def check_mapping(name: str, value: object, expected: str = "{task: ...}") -> Mapping[Any, Any]:
    """`value`, which is a mapping.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: found {type(value).__name__}, expected {expected}.")
    return value


def held_in(name: str, state: object, *keys: str) -> Mapping[Any, Any]:
    """A stored state, which holds these parts.

    Raises:
        TypeError: it is no mapping.
        ValueError: a part is missing.
    """
    found = check_mapping(name, state, "what state_dict() gave")
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{name}: found no {', '.join(missing)}, expected what state_dict() gave.")
    return found


# ---- tensors -------------------------------------------------------------------------------------


def check_tensors(**values: object) -> None:
    """All are dense tensors of real numbers.

    Raises:
        TypeError: one is no tensor, complex, or a sparse, nested or quantized one.
        ValueError: one is on meta, where there are no values.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            argument = name.rpartition(": ")[2]
            raise TypeError(
                f"{name}: found {type(value).__name__}, expected a tensor; torch.as_tensor({argument}) makes one of a "
                "list."
            )
        check_dense(name, value)
        if value.is_complex():
            raise TypeError(f"{name}: found {value.dtype}, expected a tensor of real numbers.")


def check_dense(name: str, value: Tensor, *, meta: bool = False) -> None:
    """A tensor with strides, and with values unless `meta` lets it be one without.

    Raises:
        TypeError: a sparse, nested or quantized one.
        ValueError: one on meta.
    """
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        found = (
            "a nested tensor" if value.is_nested else f"a tensor of {value.layout}, {value.dtype}"
        )
        raise TypeError(f"{name}: found {found}, expected a dense one, as .to_dense() gives it.")
    if value.is_meta and not meta:
        raise ValueError(f"{name}: found a tensor on meta, which holds no values.")
