"""Full-task unlearning with OrthoGrad: a two-task CNN forgets the images whose labels were wrong.

An eighth of the training images carry random labels, in both tasks. The net memorises them; OrthoGrad
then ascends on their losses while every step stays orthogonal to the gradients of the images to keep.

    python examples/full_task.py [--steps 60] [--tiny]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtu_fast as mtu


class Net(nn.Module):
    """A shared convolutional backbone with one linear head per task."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * width, 32),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({"colour": nn.Linear(32, 3), "corner": nn.Linear(32, 4)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits [N, classes] of each task."""
        shared = self.backbone(x)
        return {task: head(shared) for task, head in self.heads.items()}


def images(count: int, wrong: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise `[N, 3, 8, 8]` with one bright square in one channel and corner; the first labels are random."""
    colour, corner = torch.randint(3, (count,)), torch.randint(4, (count,))
    x = 0.3 * torch.randn(count, 3, 8, 8)
    for n in range(count):
        top, left = 4 * int(corner[n] // 2), 4 * int(corner[n] % 2)
        x[n, colour[n], top : top + 4, left : left + 4] += 1
    colour[:wrong] = torch.randint(3, (wrong,))
    corner[:wrong] = torch.randint(4, (wrong,))
    return x, {"colour": colour, "corner": corner}


def task_losses(model: nn.Module, x: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unreduced losses, one value per sample: {task: [N]}."""
    out = model(x)
    return {task: F.cross_entropy(out[task], y[task], reduction="none") for task in y}


@torch.no_grad()
def mean_loss(model: nn.Module, x: Tensor, y: dict[str, Tensor], chosen: Tensor) -> float:
    """Mean loss over the chosen samples and both tasks."""
    losses = task_losses(model, x, y)
    return float(sum(loss[chosen].mean() for loss in losses.values()) / len(losses))


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """Train, unlearn, print the mean losses before and after; return them as {side: (before, after)}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    args = parser.parse_args(argv)
    if args.tiny:
        args.samples, args.epochs, args.steps = 32, 60, 30

    torch.manual_seed(0)
    x, y = images(args.samples, wrong=args.samples // 8)
    forget = torch.arange(args.samples) < args.samples // 8
    model = Net(width=8)
    trainer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(args.epochs):
        trainer.zero_grad()
        total = torch.stack([loss.mean() for loss in task_losses(model, x, y).values()]).sum()
        total.backward()
        trainer.step()

    sides = {"forget": forget, "retain": ~forget}
    before = {side: mean_loss(model, x, y, chosen) for side, chosen in sides.items()}

    # Plain SGD follows the direction as it is; momentum or Adam would bend it. Ascent has no bound of
    # its own: clip the global norm, and stop where the labels to forget are no better than guessed.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = mtu.Engine(model, params=model.backbone.parameters())
    guessed = (math.log(3) + math.log(4)) / 2
    for _ in range(args.steps):
        optimizer.zero_grad()
        losses = task_losses(model, x, y)
        engine.backward(losses, mtu.OrthoGrad(alpha=0.5), forget=forget)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if mean_loss(model, x, y, forget) > guessed:
            break

    found = {side: (before[side], mean_loss(model, x, y, sides[side])) for side in sides}
    for side, (old, new) in found.items():
        print(f"{side:7} mean loss {old:.3f} -> {new:.3f}")
    return found


if __name__ == "__main__":
    main()
