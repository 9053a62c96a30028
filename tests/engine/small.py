"""A batch of samples, some of which are to be forgotten, and a step on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mtu_fast as mtu
from tests.helpers.checks import (
    trained,
    vector,
)
from tests.helpers.models.base import Forward, MultiTask
from tests.helpers.zoo import by_name

N = 6
MASK = torch.tensor([True, False, False, True, False, False])


def build(
    name: str = "mlp", tasks: int = 3, n: int = N
) -> tuple[MultiTask, Forward, list[Tensor], mtu.Engine]:
    model, forward = by_name(name).build(tasks, n)
    return model, forward, trained(model), mtu.Engine(model)


def backward_of(loss: Any, params: Sequence[Tensor]) -> Tensor:
    """The gradient of one number, end to end; the graph is kept."""
    return vector(torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True), params)
