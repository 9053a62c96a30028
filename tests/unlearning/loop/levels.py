"""Levels of two tasks whose held-out losses and scores are known, and a model whose losses are its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import mtu_fast as mtu

N = 6
MASK = torch.tensor([True, True, True, True, False, False])
HELD_OUT = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)  # mean 3


class Given(nn.Module):
    """A model whose losses are its parameters: two tasks of N samples."""

    def __init__(self, a: list[float], b: list[float]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([a, b], dtype=torch.float64))

    def losses(self) -> dict[str, Tensor]:
        return {"a": self.p[0] * 1.0, "b": self.p[1] * 1.0}


def known(**options: Any) -> mtu.Levels:
    """Levels of two tasks: held-out losses of mean 3, held-out scores 0.5."""

    def read(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"a": batch, "b": batch}

    def score(model: nn.Module, loader: Any) -> dict[str, float]:
        return {"a": 0.5, "b": 0.5}

    halves = [HELD_OUT[2:], HELD_OUT[:2]]
    return mtu.Levels(**options).measure(nn.Linear(1, 1), halves, read, score)


def kinds(found: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {task: kind.tolist() for task, kind in found.items()}


F, R, K = mtu.FORGET, mtu.RESTING, mtu.RETAIN
LOSSES = {
    "a": torch.tensor([0.1, 2.9, 3.0, 9.0, 0.0, 9.0], dtype=torch.float64),
    "b": torch.tensor([9.0, 0.1, 0.2, 3.5, 0.0, 0.0], dtype=torch.float64),
}
