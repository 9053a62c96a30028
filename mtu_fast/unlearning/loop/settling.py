"""How a run ends that settles: at the level it goes on, in ever smaller steps, and keeps the nearest of its models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtu_fast.unlearning.loop.history import History, Record


def falling(step: int, begun: int, rest: int) -> float:
    """(e - s) / (e - c), what the learning rates of step s are multiplied by.

    Args:
        step: s, the steps made before, from c to e - 1.
        begun: c, from which rates fall.
        rest: e, at which they are zero.

    Returns:
        The factor, 1 at c and above 0.
    """
    return (rest - step) / (rest - begun)


def rest_of(history: History, settle: int | None, max_steps: int | None) -> int | None:
    """min(c + K, `max_steps`), the step at which a run is at rest; None before it is at the level, or without K.

    Args:
        history: says c, the first evaluation at the level.
        settle: K.
        max_steps: at most.

    Returns:
        The step, or None.
    """
    begun = history.reached
    if settle is None or begun is None:
        return None
    rest = begun + settle
    return rest if max_steps is None else min(rest, max_steps)


def is_nearest(history: History) -> bool:
    """Whether no evaluation at the level is nearer than the last one; before there are any it is."""
    last = history.records[-1]
    before = [record for record in history.records[:-1] if history.is_down(record)]
    if not before:
        return True
    least = min(apart(history, record) for record in before)
    # of two that are as near the later one has recovered for longer
    return history.is_down(last) and apart(history, last) <= least


def apart(history: History, record: Record) -> float:
    """Σ_t |v_t - v°_t| / |v°_t| + |f_t - a_t| / |a_t| + (r°_t - r_t)₊ / |r°_t|: UIS on validation data, and losses.

    v are scores on validation data, f on forget data and r on retained data, ° those of the
    original. a is v° for a target, and f° for another task. UIS has a factor before. A score of the
    original that is 0 divides by 1; one that is not finite, as without labels, is left out.
    """
    first = history.records[0]
    total = 0.0
    # in the order of the first evaluation, which all ranks and a resumed run have: that of sets differs, and so do sums
    for task, ideal in first.validation.items():
        total += _over(record.validation.get(task, math.nan), ideal)
    for task, score in first.forget.items():
        ideal = first.validation.get(task, math.nan) if task in history.targets else score
        total += _over(record.forget.get(task, math.nan), ideal)
    for task, ideal in first.retain.items():
        # to rise is no loss
        total += _over(min(record.retain.get(task, math.nan), ideal), ideal)
    return total


def _over(found: float, ideal: float) -> float:
    if not math.isfinite(ideal):
        return 0.0
    return abs(found - ideal) / (abs(ideal) or 1.0) if math.isfinite(found) else math.inf


@contextmanager
def slowed(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Learning rates times a factor inside; a scheduler goes by those outside."""
    # an optimizer may change its own, and one that is a tensor stays the one that a compiled step knows
    if factor == 1.0:
        yield
        return
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["lr"]
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr
