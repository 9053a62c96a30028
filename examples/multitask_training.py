"""Multi-task training without unlearning: PCGrad, UPGrad and the plain sum on two tasks that conflict.

No sample is marked `forget`, so every row is a retained one. Methods of this kind work on one mean
gradient per task (`per="task"`), which `engine.backward` takes by itself.

    python examples/multitask_training.py [--steps 200] [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mtu_fast as mtu

METHODS: dict[str, mtu.Method] = {
    "sum": mtu.Sum(),
    "PCGrad": mtu.PCGrad(),
    "UPGrad": mtu.UPGrad(),
}


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Squared errors [N] of two targets that one shared output has to serve; the second is 10 times as long."""
    out = model(x).squeeze(1)
    return {"near": (out - y).square(), "far": (out + 10 * y).square()}


def train(method: mtu.Method, steps: int) -> dict[str, float]:
    """Train a fresh net with one method; the mean loss of each task in the end."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = x[:, 0] * x[:, 1]
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    engine = mtu.Engine(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        engine.backward(losses_of(model, x, y), method)
        optimizer.step()
    return {task: float(loss.detach().mean()) for task, loss in losses_of(model, x, y).items()}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train with every method and print a line each; return {method: {task: mean loss}}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    args = parser.parse_args(argv)
    steps = 20 if args.tiny else args.steps

    found = {"start": train(mtu.Sum(), steps=0)}
    for name, method in METHODS.items():
        found[name] = train(method, steps)
    for name, losses in found.items():
        print(f"{name:7}" + "".join(f"  {task} {loss:8.3f}" for task, loss in losses.items()))
    return found


if __name__ == "__main__":
    main()
