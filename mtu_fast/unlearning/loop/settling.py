"""How a run ends that settles: at the level it goes on, in ever smaller steps, and keeps the nearest of its models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtu_fast.unlearning.loop.history import History, Record


def rate(history: History, step: int, settle: int | None, max_steps: int | None) -> float:
    """1 - (s - c) / K, what the learning rates of step s are multiplied by; 1 before c.

    Args:
        history: says c, the first evaluation at the level.
        step: s, the steps made before.
        settle: K; None where the run ends at the level.
        max_steps: at which the rate is zero at the latest.

    Returns:
        The factor, above 0 and at most 1.
    """
    begun = history.reached
    if settle is None or begun is None or step < begun:
        return 1.0
    last = begun + settle if max_steps is None else min(begun + settle, max_steps)
    return (last - step) / (last - begun)


def is_nearest(history: History) -> bool:
    """Whether the last evaluation is nearer than all before that were at the level; before there are any it is."""
    last = history.records[-1]
    before = [record for record in history.records[:-1] if history.is_down(record)]
    if not before:
        return True
    least = min(apart(history, record) for record in before)
    return history.is_down(last) and apart(history, last) < least


def apart(history: History, record: Record) -> float:
    """Σ_t |v_t - v°_t| / |v°_t| + |f_t - a_t| / |a_t|: UIS on validation data, but for a factor.

    v are scores on validation data and f on forget data, ° those of the original. a is v° for a
    target, and f° for another task. A score of the original that is 0 divides by 1.
    """
    first = history.records[0]
    total = 0.0
    for task in first.validation.keys() & record.validation.keys():
        total += _over(record.validation[task], first.validation[task])
    for task in first.forget.keys() & record.forget.keys():
        there = first.validation if task in history.targets else first.forget
        total += _over(record.forget[task], there[task])
    return total


def _over(found: float, ideal: float) -> float:
    return abs(found - ideal) / (abs(ideal) or 1.0)


@contextmanager
def slowed(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """Learning rates times a factor inside; a scheduler goes by those outside."""
    if factor == 1.0:
        # a rate that is a tensor stays the one that a compiled step knows
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
