"""A short run whose state is easy to compare with that of an undisturbed one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtu_fast as mtu
from tests.unlearning.loop.scene import net, parameters, sides

STEPS, EVERY = 4, 2


class Scene:
    """A short run whose state is easy to compare."""

    def __init__(self, path: Path | None = None) -> None:
        self.model = net(seed=5)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.path = path

    def run(self, **more: Any) -> mtu.History:
        given: dict[str, Any] = {
            **sides(),
            "method": mtu.GradDiff(),
            "max_steps": STEPS,
            "every": EVERY,
            "progress": False,
            "checkpoint": self.path,
            **more,
        }
        return mtu.unlearn(self.model, self.optimizer, **given)

    def step(self) -> int:
        """The evaluation whose state model and optimizer have."""
        found = [s for s in states() if torch.equal(states()[s], parameters(self.model))]
        assert len(found) == 1, "the model is in no state of an evaluation"
        made = {int(one["step"]) for one in self.optimizer.state.values()} or {0}
        assert made == {found[0]}
        assert all(p.grad is None for p in self.model.parameters())
        return found[0]


@cache
def states() -> dict[int, Tensor]:
    """{step: parameters} at the evaluations of an undisturbed run."""
    found = {0: parameters(Scene().model)}
    for step in range(EVERY, STEPS + 1, EVERY):
        scene = Scene()
        scene.run(max_steps=step)
        found[step] = parameters(scene.model)
    return found
