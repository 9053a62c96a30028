"""A run that gives up in a step, and everything that it needs, built anew as another process would."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mtu_fast as mtu
from tests.helpers.models.base import MultiTask
from tests.unlearning.loop.scene import losses, net, sides, trained


class Interrupted(Exception):
    """Not an error of the run."""


def until(step: int | None) -> Callable[[nn.Module, Any], Any]:
    """The losses, which give up in the forward of the forget batch of a step (from 1)."""
    calls = [0]

    def function(model: nn.Module, batch: Any) -> Any:
        calls[0] += torch.is_grad_enabled()
        if step is not None and calls[0] == 2 * step:
            raise Interrupted
        return losses(model, batch)

    return function


class Scene:
    """Everything a call of `unlearn` needs, built anew as another process would."""

    def __init__(self, method: Callable[[], Any], path: Path | None, **options: Any) -> None:
        torch.manual_seed(11), random.seed(12), np.random.seed(13)
        self.model: MultiTask = trained(net(dropout=0.2))
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.02, total_steps=40)
        self.arguments: dict[str, Any] = {
            **sides(shuffle=True), "method": method(), "max_steps": 14, "every": 4, "scheduler": scheduler,
            "clip": 1.0, "progress": False, "checkpoint": path, **options,
        }  # fmt: skip

    def run(self, give_up: int | None = None, **more: Any) -> mtu.History:
        return mtu.unlearn(
            self.model, self.optimizer, **{**self.arguments, "losses": until(give_up), **more}
        )
