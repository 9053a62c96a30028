"""Weights of rows: one vector for all parameters, or one for each layer or tensor; and those for parameters outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from mtu_fast._arguments import check_tensors
from mtu_fast._checks.flags import AT_ONCE, Flags
from mtu_fast._checks.values import all_finite
from mtu_fast._rows.grad import not_finite
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows


def spread(w: Tensor, shared: Shared, rows: int, like: Tensor) -> list[Tensor]:
    """The weights `[R]` of every parameter.

    Args:
        w: `[R]`, or `[L, R]` with L the number of layers or of parameter tensors.
        shared: the parameters.
        rows: R.
        like: a tensor of the dtype and device wanted.

    Raises:
        TypeError: no real dense tensor.
        ValueError: another shape, or a tensor on meta.
    """
    _check_kind(w, rows)
    if w.shape == (rows,):
        # one tensor for all, so that it is narrowed once
        return [w.detach().to(like)] * len(shared.names)
    counts = {per: len(shared.groups(per)) for per in ("layer", "tensor")}
    is_per_group = w.dim() == 2 and len(w) in counts.values()
    if w.shape[-1:] != (rows,) or not is_per_group:
        raise ValueError(
            f"weights: found shape {tuple(w.shape)}, expected [{rows}], one per row, or "
            f"[{counts['layer']}, {rows}] per layer, [{counts['tensor']}, {rows}] per tensor."
        )
    w = w.detach().to(like)
    # where both counts are equal, the groups are the same
    per = "layer" if len(w) == counts["layer"] else "tensor"
    of_group = w.unbind()
    places = shared.places(per)
    return [of_group[places[parameter]] for parameter in shared.parameters]


def _check_kind(w: Any, rows: int) -> None:
    if not isinstance(w, Tensor):
        found = type(w).__name__
        raise TypeError(f"weights: found {found}, expected a real tensor [{rows}], one per row.")
    check_tensors(weights=w)


def has_outside(parts: Sequence[TaskRows]) -> bool:
    """Whether the rows' losses reach parameters outside the shared ones."""
    return any(gradients for part in parts for gradients in part.outside.values())


def outside_gradients(
    parts: Sequence[TaskRows], w: Tensor, flags: Flags = AT_ONCE
) -> dict[Tensor, Tensor]:
    """`Σ w_group · gradient of the group's summed losses`, over the groups (kind, task) of every part.

    Args:
        parts: R rows.
        w: weights `[R]`, equal within a group.
        flags: of the call.

    Returns:
        {parameter outside: gradient}.

    Raises:
        TypeError: no real dense tensor.
        ValueError: weights of another shape, or that differ within a group.
    """
    found: dict[Tensor, Tensor] = {}
    for part in parts:
        found |= part.weighted
    if not has_outside(parts):
        return found
    check_outside(w, sum(map(len, parts)))
    differs = []
    pieces = w.detach().double().split([len(part) for part in parts])
    for part, mine in zip(parts, pieces, strict=True):
        for kind, gradients in part.outside.items():
            if not gradients:
                continue
            others = part.roles.kind != kind
            # weights are equal where the largest and the least are
            largest = mine.masked_fill(others, -inf).amax()
            differs.append(largest > mine.masked_fill(others, inf).amin())
            # a kind that only the device knows to have no rows
            weight = torch.where(others.all(), 0.0, largest) if flags.deferred else largest
            _add(found, gradients, weight)
    if differs:
        flags.refuse(torch.stack(differs).any(), lambda: _differ(w))
    return found


def _differ(w: Tensor) -> Exception:
    if not all_finite([w]):
        return not_finite()
    return ValueError(
        "weights differ between rows of one kind and task, but the engine has parameters outside `params`, "
        "whose gradients are known per kind and task only; say what those get by backward(w, outside=weights "
        "[R]) or a method whose outside() is equal within them, or take rows with per='task'."
    )


def check_outside(w: Any, rows: int) -> None:
    """Weights of the losses for parameters outside, one per row.

    Raises:
        TypeError: no real dense tensor.
        ValueError: another shape.
    """
    check_tensors(outside=w)
    if w.shape[-1:] != (rows,):
        raise ValueError(
            f"outside: found shape {tuple(w.shape)}, expected weights [{rows}], one per row."
        )
    if w.dim() != 1:
        raise ValueError(
            "weights per layer say nothing of parameters outside; use a method instead."
        )


def _add(found: dict[Tensor, Tensor], gradients: Mapping[Tensor, Tensor], weight: Tensor) -> None:
    for parameter, g in gradients.items():
        part = g * weight.to(g.dtype)
        found[parameter] = found[parameter] + part if parameter in found else part
