"""Explicit rows side by side in one matrix, parameters' columns in their order: few calls, whatever they are.

Of rows kept across steps some parameters are kept as factors (`keeping.py`), and have no columns.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mtu_fast._rows.one_input import joined
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import Formed, Span, TaskRows
from mtu_fast._rows.uses import Dense, Use
from mtu_fast.methods import FORGET, RESTING

Columns = Mapping[int, Span]  # parameter -> where it lies
NONE: frozenset[int] = frozenset()


def columns(shared: Shared, factors: Container[int] = NONE) -> Columns:
    """The columns of each parameter, but of those that are kept as factors."""
    found, start = {}, 0
    for j, parameter in enumerate(shared.parameters):
        if j not in factors:
            found[j] = (start, start + parameter.numel())
            start += parameter.numel()
    return found


def width(places: Columns) -> int:
    """All columns."""
    return max((stop for _, stop in places.values()), default=0)


def ranges(group: Sequence[int], places: Columns) -> list[Span]:
    """The columns of a group of parameters, in as few ranges as possible."""
    found: list[Span] = []
    for j in group:
        if j not in places:
            continue
        start, stop = places[j]
        # neighbours join: one product over both ranges
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def views(
    matrix: Tensor, shared: Shared, places: Columns, reached: Iterable[int]
) -> dict[int, Use]:
    """{parameter: its columns as a use}, of the parameters that a row reaches and that have some."""
    found: dict[int, Use] = {}
    for j in reached:
        if j in places:
            shape = tuple(shared.parameters[j].shape)
            rows = matrix[:, slice(*places[j])].view(len(matrix), *shape)
            found[j] = Dense(shape, rows)
    return found


def formed(parts: Sequence[TaskRows], shared: Shared, factors: frozenset[int] = NONE) -> Formed:
    """The rows of these parts that are not to be forgotten: formed once, and let go of with the parts."""
    known = _known(parts, factors)
    if known is not None:
        return known
    chosen = [_retained(part) for part in parts]
    counts, places = [len(at) for at in chosen], columns(shared, factors)
    like, dtype = shared.parameters[0], _dtype(parts, shared)
    matrix = like.new_empty(sum(counts), width(places), dtype=dtype)
    pieces = matrix.split(counts)
    for j, (start, stop) in places.items():
        _write([piece[:, start:stop] for piece in pieces], parts, chosen, j)
    found = Formed(matrix, counts, _laid(parts, chosen), sum(map(len, parts)), factors)
    for part in parts:
        part.formed = found
    return found


def forget_sums(
    parts: Sequence[TaskRows],
    tasks: Sequence[str],
    shared: Shared,
    places: Columns,
    dtype: torch.dtype,
) -> Tensor:
    """`[T, ΣP]`: the sum of each task's rows to forget, those at rest left out."""
    found = shared.parameters[0].new_zeros(len(tasks), width(places), dtype=dtype)
    chosen = [(part.roles.kind == FORGET).nonzero().flatten() for part in parts]
    row_of = [
        tasks.index(part.roles.tasks[0]) if len(at) else -1
        for part, at in zip(parts, chosen, strict=True)
    ]
    for j, (start, stop) in places.items():
        there = _reaching(parts, chosen, j)
        for some in joined([parts[i].uses[j] for i in there], [chosen[i] for i in there]):
            for k, total_of in zip(some.of, some.sums(), strict=True):
                found[row_of[there[k]], start:stop] += total_of
    return found


def _known(parts: Sequence[TaskRows], factors: frozenset[int]) -> Formed | None:
    """The rows where they were formed before, of these parts and columns and no others."""
    known = parts[0].formed
    if known is None or known.count != sum(map(len, parts)) or known.factors != factors:
        return None
    return known if all(part.formed is known for part in parts) else None


def _retained(part: TaskRows) -> Tensor:
    """Indices of the rows that are not to be forgotten."""
    kind = part.roles.kind
    return ((kind != FORGET) & (kind != RESTING)).nonzero().flatten()


def _laid(parts: Sequence[TaskRows], chosen: Sequence[Tensor]) -> Tensor:
    """Indices into each part as indices into all parts laid end to end."""
    found, start = [], 0
    for part, at in zip(parts, chosen, strict=True):
        found.append(at + start)
        start += len(part)
    return torch.cat(found)


def _reaching(parts: Sequence[TaskRows], chosen: Sequence[Tensor], j: int) -> list[int]:
    """Which parts have rows that are chosen and reach parameter j."""
    return [i for i, part in enumerate(parts) if len(chosen[i]) and j in part.uses]


def _write(
    pieces: Sequence[Tensor], parts: Sequence[TaskRows], chosen: Sequence[Tensor], j: int
) -> None:
    """Write the columns of parameter j of the rows chosen, `[len(at), columns]` for each part."""
    there = _reaching(parts, chosen, j)
    # the memory is uninitialised: all of it is written, with zeros where no row reaches
    for i in set(range(len(parts))).difference(there):
        pieces[i].zero_()
    for some in joined([parts[i].uses[j] for i in there], [chosen[i] for i in there]):
        for k, rows in zip(some.of, some.rows(), strict=True):
            pieces[there[k]].copy_(rows)


def _dtype(parts: Sequence[TaskRows], shared: Shared) -> torch.dtype:
    """One that holds all parameters' rows."""
    found = shared.parameters[0].dtype
    for part in parts:
        for use in part.uses.values():
            found = torch.promote_types(found, use.dtype)
    return found
