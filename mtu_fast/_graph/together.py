"""Several rows through some map: all at once by vmap, a few at a time where memory is short, else one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from mtu_fast._graph.nodes import densified
from mtu_fast._ops._blocks import working_dtype

ROOM = 1 << 28  # bytes of gradients of several rows that are held at a time, about

Found = list[Tensor | None]
# gradients of one row -> what becomes of them, None where there is nothing
Each = Callable[[list[Tensor]], Found]


class Together:
    """Rows through some map, all at once by vmap where it can be relied on, else one after another.

    vmap runs some nodes (cdist) without an error, and wrongly. What it gives for several rows is
    therefore compared with what the map makes of their sum: once for every place of a plan, if two
    rows are not zero there, and else again.

    Args:
        known: what was found at each place; filled in.

    Attributes:
        passed: whether rows went through several nodes by a pass of their own.
    """

    def __init__(self, known: dict[object, bool]) -> None:
        self._known = known
        self.passed = False

    def __call__(self, place: object, one: Each, batched: Each, parts: list[Tensor]) -> Found:
        """Gradients of several rows, each `[K, …]`, through the map at some place of the graph."""
        # a single row gains nothing by vmap
        if len(parts[0]) > 1 and self._known.get(place, True):
            rows = self._batched(place, one, batched, parts)
            if rows is not None:
                return rows
        found: list[Found] = []
        for k in range(len(parts[0])):
            found.append(one([part[k] for part in parts]))
        return [_joined(of_rows, torch.stack) for of_rows in zip(*found, strict=True)]

    def _batched(
        self, place: object, one: Each, batched: Each, parts: list[Tensor]
    ) -> Found | None:
        """What vmap makes of the rows; None where it raises or is wrong."""
        # one by one it is either right, or raised again
        with warnings.catch_warnings(), suppress(Exception):
            warnings.simplefilter("ignore")  # vmap tells of what it does one by one itself
            rows = batched(parts)
            if place in self._known or self._adds_up(place, rows, one, parts):
                return rows
        self._known[place] = False
        return None

    def _adds_up(self, place: object, rows: Found, one: Each, parts: list[Tensor]) -> bool:
        """Whether rows are parts of what the map makes of their sum; remembered where rows said anything."""
        told = True
        # linearity: Σ_r map(row_r) = map(Σ_r row_r)
        for of, g in zip(rows, one([part.sum(0) for part in parts]), strict=True):
            if of is None or g is None:
                continue
            dtype = working_dtype(of)
            sizes = of.to(dtype).flatten(1).norm(dim=1)
            error = (of.sum(0, dtype=dtype) - densified(g)).norm()
            rounding = 64 * torch.finfo(of.dtype).eps * sizes.sum()
            if not bool(error <= rounding):  # so that NaN is an error, too
                return False
            # of a single row that is not zero, any mixture of rows adds up
            told = told and int((sizes > 0).sum()) > 1
        if told:
            self._known[place] = True
        return True


def in_portions(
    several: Callable[[Tensor], Found], count: int, size: int, device: torch.device
) -> Found:
    """Row numbers in portions that take about `ROOM` bytes, each row taking `size`; what they give joined."""
    # at least one row, however large it is
    step = max(1, min(count, ROOM // max(size, 1)))
    portions: list[Found] = []
    for k in range(0, count, step):
        numbers = torch.arange(k, min(k + step, count), device=device)
        portions.append(several(numbers))
    return [_joined(parts, torch.cat) for parts in zip(*portions, strict=True)]


def _joined(
    parts: Sequence[Tensor | None], join: Callable[[list[Tensor]], Tensor]
) -> Tensor | None:
    there = [densified(part) for part in parts if part is not None]
    # what a node hands on follows from the node, not from the row
    return join(there) if there else None


def mapped(one: Each) -> Each:
    """`one` under vmap, which knows no None."""

    def batched(parts: list[Tensor]) -> Found:
        absent: list[bool] = []

        def present(given: list[Tensor]) -> list[Tensor]:
            found = one(given)
            # which outputs are missing is the same for every row, so one trace tells
            absent[:] = [g is None for g in found]
            return [g for g in found if g is not None]

        found = iter(torch.vmap(present)(parts))
        return [None if missing else next(found) for missing in absent]

    return batched
