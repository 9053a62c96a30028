"""Partial-task unlearning: forget the samples from one task of two, and keep their other task.

`forget={"left": mask}` names the task. `InterferenceAware` moves inside the span of gradients of that
task, kept from earlier batches in a `Subspace`, and orthogonally to everything to be retained: the
retain samples of both tasks, and the forget samples' other task.

    python examples/partial_task.py [--steps 60] [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtu_fast as mtu

TASKS = ("left", "right")


class Net(nn.Module):
    """A shared backbone and a linear head per task."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.heads = nn.ModuleDict({task: nn.Linear(width, 5) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits [N, 5] of each task."""
        shared = self.backbone(x)
        return {task: head(shared) for task, head in self.heads.items()}


def task_losses(model: nn.Module, x: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unreduced losses, one value per sample: {task: [N]}."""
    out = model(x)
    return {task: F.cross_entropy(out[task], y[task], reduction="none") for task in TASKS}


def memorise(model: nn.Module, x: Tensor, y: dict[str, Tensor], epochs: int) -> None:
    """Train until the labels are known by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        optimizer.zero_grad()
        torch.stack(list(task_losses(model, x, y).values())).mean().backward()
        optimizer.step()


@torch.no_grad()
def scores(
    model: nn.Module, x: Tensor, y: dict[str, Tensor], forget: Tensor
) -> dict[tuple[str, str], float]:
    """Mean loss of each (task, side)."""
    losses = task_losses(model, x, y)
    sides = {"forget": forget, "retain": ~forget}
    return {
        (task, side): float(losses[task][chosen].mean())
        for task in TASKS
        for side, chosen in sides.items()
    }


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, str], tuple[float, float]]:
    """Memorise, unlearn from "left", print mean losses; return them as {(task, side): (before, after)}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    args = parser.parse_args(argv)
    if args.tiny:
        args.samples, args.width, args.steps = 32, 48, 40

    torch.manual_seed(0)
    x = torch.randn(args.samples, 16)
    y = {task: torch.randint(5, (args.samples,)) for task in TASKS}
    forget = torch.arange(args.samples) < args.samples // 8
    model = Net(args.width)
    memorise(model, x, y, epochs=50)
    before = scores(model, x, y, forget)

    engine = mtu.Engine(model, params=model.backbone.parameters())
    method = mtu.InterferenceAware(alpha=0.1)
    subspace = mtu.Subspace()  # fills in the first steps, which are OrthoGrad's
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(0)
    retained = (~forget).nonzero().flatten()
    for _ in range(args.steps):
        some = retained[torch.randperm(len(retained), generator=generator)[: len(retained) // 4]]
        batch = torch.cat([forget.nonzero().flatten(), some])
        losses = task_losses(model, x[batch], {task: y[task][batch] for task in TASKS})
        optimizer.zero_grad()
        engine.backward(losses, method, forget={"left": forget[batch]}, subspace=subspace)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if scores(model, x, y, forget)["left", "forget"] > 1.6:  # ln 5, a guess
            break

    after = scores(model, x, y, forget)
    print(subspace)
    for key, old in before.items():
        print(f"{key[0]:5} {key[1]:7} mean loss {old:.3f} -> {after[key]:.3f}")
    return {key: (before[key], after[key]) for key in before}


if __name__ == "__main__":
    main()
