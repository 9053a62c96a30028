"""A small net of two tasks, its batches, and steps that fail."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mtu_fast as mtu

N, FORGOTTEN = 8, 3


MASK = torch.arange(N) < FORGOTTEN


PARTIAL = {"a": MASK}


class Net(nn.Module):
    """A shared layer, a convolution's worth of smoothness, two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh())
        self.heads = nn.ModuleDict({"a": nn.Linear(24, 1), "b": nn.Linear(24, 1)})

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        shared = self.backbone(x)
        return {task: (head(shared)[:, 0] - x[:, 0]).square() for task, head in self.heads.items()}


def build(dtype: torch.dtype = torch.float64) -> tuple[Net, mtu.Engine]:
    torch.manual_seed(0)
    net = Net().to(dtype)
    return net, mtu.Engine(net, params=net.backbone.parameters())


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def move(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.01)


def named(rows: mtu.Rows) -> dict[str, Tensor]:
    held = rows.jacobian()
    return {name: held[p] for name, p in rows.parameters.items() if p in held}


def broken(net: Net, seed: int) -> dict[str, Tensor]:
    """Losses of which sample 2 of task a has an infinite gradient."""
    losses = net.losses(batch(seed))
    value = losses["a"].detach()
    losses["a"] = (losses["a"] - value + (torch.arange(N) != 2)).sqrt()
    return losses


class Refuses(mtu.InterferenceAware):
    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        raise ArithmeticError("not today")
