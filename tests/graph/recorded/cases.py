"""What a recorded op is made of: tensors of any numbers, and the table of cases by op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Case = Callable[..., Any]  # without arguments; it returns a tensor or several

CASES: dict[str, list[Case]] = {}


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def case(op: str, *makers: Case) -> None:
    """Ways to record an op."""
    CASES.setdefault(op, []).extend(makers)


def x(*shape: int) -> Tensor:
    """Any numbers, of either sign."""
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def u(*shape: int) -> Tensor:
    """Numbers between 0.1 and 0.9."""
    return (torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()


SHAPES = ((3,), (3, 4), (2, 3, 4), (1, 3, 1), ())
PAIRS = (
    ((3, 4), (3, 4)), ((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (3, 4)), ((2, 1, 4), (3, 1)), ((1, 4), (3, 1)),
    ((), (3, 4)), ((2, 3, 4), ()), ((1,), (3, 1)),
    ((3, 3), (3,)), ((3,), (3, 3, 3)), ((3, 1, 3), (3, 3)),
)  # fmt: skip


def each(op: str, function: Callable[[Tensor], Any], make: Callable[..., Tensor] = u) -> None:
    """An op of one tensor."""
    case(op, *(lambda s=s: function(make(*s)) for s in SHAPES))
    case(op, lambda: function(make(2, 3, 4, 5).to(memory_format=torch.channels_last)))
    case(op, lambda: function(make(3, 4).t()))


def both(
    op: str, function: Callable[[Tensor, Tensor], Any], make: Callable[..., Tensor] = u
) -> None:
    """An op of two tensors that broadcast."""
    case(op, *(lambda s=s, t=t: function(make(*s), make(*t)) for s, t in PAIRS))


REDUCTIONS = ("none", "mean", "sum")


def index(size: int, *shape: int) -> Tensor:
    return torch.randint(0, size, shape)
