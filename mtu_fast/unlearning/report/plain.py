"""What users hand over as plain data for JSON: mappings, lists, strings, finite numbers and None."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mtu_fast._arguments import check_mapping, shown


def plain(value: Any) -> Any:
    """Mappings, lists, strings, finite numbers and None; a number that is not finite becomes None."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return _plain_mapping(value)
    if isinstance(value, Iterable):
        return list(map(plain, value))
    number = _number("value", value)
    if not math.isfinite(number):
        return None
    return number


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass  # no number, or an array of several
    raise TypeError(f"{name}: found {shown(value)}, expected a number.")


def check_cost(cost: object) -> None:
    """{what: number}, or {what: {variant: number}}; None for what was not measured.

    Raises:
        TypeError: something else.
    """
    if cost is None:
        return
    for what, given in check_mapping("cost", cost, "{what: number}").items():
        of_variants = given.values() if isinstance(given, Mapping) else (given,)
        for value in of_variants:
            if value is not None:
                _number(f"cost[{what!r}]", value)


def _plain_mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    found = {}
    for key, item in value.items():
        found[str(key)] = plain(item)
    return found


def records(history: object) -> list[dict[str, Any]] | None:
    """The records of a history as plain data: dictionaries or dataclasses with `step`.

    Raises:
        TypeError: no `.records`, or records that are neither.
    """
    if history is None:
        return None
    found = getattr(history, "records", history)
    if not isinstance(found, Sequence):
        raise TypeError(
            f"history: found {type(history).__name__}, expected something with .records, a list."
        )
    return list(map(_record, found))


def _record(given: Any) -> dict[str, Any]:
    row = given
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        row = dataclasses.asdict(given)
    if not isinstance(row, Mapping) or "step" not in row:
        raise TypeError(
            f"history: found a record {given!r:.80}, expected a mapping or dataclass with "
            '"step", the number of steps so far.'
        )
    _number("history: step", row["step"])
    for name, value in row.items():
        try:
            plain(value)
        except TypeError as error:
            raise TypeError(f"history: {name}: {error}") from error
    return _plain_mapping(row)


def step_cost(
    cost: Mapping[str, Any] | None, history: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any] | None:
    """The cost as given, and the time of a step where the records of a history hold "seconds"."""
    found = dict(plain(cost or {}))
    timed = []
    for record in history or ():
        if isinstance(record.get("seconds"), int | float):
            timed.append(record)
    if timed:
        found |= _time_of_a_step(timed[0], timed[-1])
    return found or None


def _time_of_a_step(first: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    steps = last["step"] - first["step"]
    if steps <= 0:
        return {}
    seconds = last["seconds"] - first["seconds"]
    each = 1000 * seconds / steps
    return {"steps": steps, "seconds": seconds, "ms a step, from the history": each}
