"""What `state_dict` gave, looked at before it is taken: a foreign or damaged state changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtu_fast._arguments import (
    MOST,
    check_dense,
    check_dtype,
    check_mapping,
    check_whole,
    held_in,
    names,
    shown,
)

COLUMNS = {"task": torch.int64, "sample": torch.int64, "loss": torch.float64}
PARTS = ("vectors", "factors", "counts", *COLUMNS, "tasks", "dtype", "reached", "grams")


def check_counts(name: str, state: Mapping[str, Any]) -> None:
    """How many rows are to be held, and how long none was taken in.

    Raises:
        TypeError: no whole numbers.
        ValueError: one out of range.
    """
    if state["size"] is not None:
        check_whole(f"{name}: size", state["size"], 1, MOST)
    check_whole(f"{name}: age", state["age"], 0, MOST)


def check_rows(name: str, state: object) -> None:
    """K rows: their vectors or factors, their roles and their Grams.

    Raises:
        TypeError: a part of another kind.
        ValueError: a part is missing, or the parts are not of the same K rows.
    """
    held = held_in(name, state, *PARTS)
    task = held["task"]
    count = len(task) if isinstance(task, Tensor) and task.dim() else 0
    for column, dtype in COLUMNS.items():
        _check_column(f"{name}: {column}", held[column], dtype, count)
    _check_matrices(f"{name}: counts", held["counts"], count)
    known = names(f"{name}: tasks", held["tasks"])
    # by now the column is one of whole numbers
    if count and (int(task.min()) < 0 or int(task.max()) >= len(known)):
        raise ValueError(f"{name}: task: found other indices than those of the {len(known)} tasks.")
    check_dtype(f"{name}: dtype", held["dtype"])
    _check_vectors(f"{name}: vectors", held["vectors"], count)
    if not held["vectors"] and not check_mapping(f"{name}: factors", held["factors"]):
        raise ValueError(f"{name}: vectors: found none, expected those of a parameter at least.")
    for of_task in check_mapping(f"{name}: reached", held["reached"], "{task: names}").values():
        _check_names(f"{name}: reached", of_task)
    _check_grams(f"{name}: grams", held["grams"], count)


def check_own_rows(name: str, state: object) -> Mapping[Any, Any]:
    """The rows of one step and task that one of several ranks holds; none possibly.

    Raises:
        TypeError: a part of another kind.
        ValueError: a part is missing, or columns are not of the same rows.
    """
    held = held_in(name, state, "vectors", "factors", "task", "sample", "loss", "dtype")
    check_dtype(f"{name}: dtype", held["dtype"])
    names(f"{name}: task", [held["task"]])
    lengths = {}
    for column in ("sample", "loss"):
        lengths[column] = _length(f"{name}: {column}", held[column], COLUMNS[column])
    for key, v in check_mapping(f"{name}: vectors", held["vectors"], "{name: [K, ...]}").items():
        lengths[key] = len(v) if isinstance(v, Tensor) and v.dim() else -1
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: found rows {lengths}, expected as many in every part.")
    return held


def check_parts(
    name: str, state: object, tensors: Sequence[str], numbers: Sequence[str]
) -> dict[str, dict[Any, Any]]:
    """{part: {task: value}} of a state, the values of each part tensors or numbers.

    Raises:
        TypeError: a part, or a value in it, of another kind.
        ValueError: a part is missing.
    """
    held = held_in(name, state, *tensors, *numbers)
    found = {}
    for part in tensors:
        found[part] = _by_task(f"{name}: {part}", held[part], Tensor)
    for part in numbers:
        found[part] = _by_task(f"{name}: {part}", held[part], (int, float))
    return found


def _by_task(name: str, part: object, kind: Any) -> dict[Any, Any]:
    by_task = dict(check_mapping(name, part, "{task: value}"))
    for value in by_task.values():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: found {shown(value)}, expected what it was stored as.")
    return by_task


def _length(name: str, column: object, dtype: torch.dtype) -> int:
    """K of a tensor `[K]` of that dtype, which a column is."""
    if not isinstance(column, Tensor) or column.dtype != dtype or column.dim() != 1:
        raise TypeError(f"{name}: found {_of(column)}, expected a tensor [K] {dtype}.")
    return len(column)


def _check_column(name: str, column: object, dtype: torch.dtype, count: int) -> None:
    if not isinstance(column, Tensor) or column.dtype != dtype or not _has(column, count):
        raise TypeError(f"{name}: found {_of(column)}, expected a tensor [{count or 'K'}] {dtype}.")
    check_dense(name, column)


def _has(column: Tensor, count: int) -> bool:
    """Whether it is `[count]`, and of one row at least."""
    return count > 0 and column.shape == (count,)


def _check_matrices(name: str, counts: object, count: int) -> None:
    """How many rows lie in each matrix."""
    if not isinstance(counts, list) or not all(type(each) is int and each > 0 for each in counts):
        raise TypeError(f"{name}: found {shown(counts)}, expected a list of whole numbers.")
    if sum(counts) != count:
        raise ValueError(f"{name}: found {shown(counts)}, expected numbers whose sum is {count}.")


def _check_vectors(name: str, vectors: object, count: int) -> None:
    for key, v in check_mapping(name, vectors, "{name: [K, ...]}").items():
        if not isinstance(v, Tensor) or not v.dim() or len(v) != count:
            raise ValueError(f"{name}[{key!r}]: found {_of(v)}, expected [{count}, ...].")


def _check_names(name: str, found: object) -> None:
    """Names of parameters; none, where rows reach none."""
    if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
        raise TypeError(f"{name}: found {shown(found)}, expected a list of names of parameters.")


def _check_grams(name: str, grams: object, count: int) -> None:
    if not isinstance(grams, list | tuple):
        raise TypeError(f"{name}: found {shown(grams)}, expected a list of (parameters, Gram).")
    for pair in grams:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        group, gram = pair if is_pair else (None, None)
        _check_gram(name, gram, count)
        _check_indices(name, group)


def _check_indices(name: str, group: object) -> None:
    if not isinstance(group, list | tuple) or not all(type(j) is int for j in group):
        raise TypeError(f"{name}: found {shown(group)}, expected the indices of parameters.")


def _check_gram(name: str, gram: object, count: int) -> None:
    if not isinstance(gram, Tensor) or gram.shape != (count, count):
        raise ValueError(f"{name}: found {_of(gram)}, expected a Gram [{count}, {count}].")
    if gram.dtype != torch.float64:
        raise TypeError(f"{name}: found a Gram of {gram.dtype}, expected torch.float64.")
    check_dense(name, gram)


def _of(value: object) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} {value.dtype}"
    return shown(value)
