"""Nets of which rows are kept as factors, of few positions, tables and few pixels; and what of each is kept so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtu_fast as mtu
from tests.helpers.checks import clear
from tests.kept.scene import move

N, WIDTH, S, VOCABULARY = 6, 96, 3, 600
MASK = torch.arange(N) < 2
TASKS = ("a", "b")


class Heads(nn.Module):
    """Losses of two tasks on features `[N, WIDTH]`; `task` alone for one that only some steps have."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, WIDTH) for task in TASKS})

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def losses(self, x: Tensor, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        h = self.features(x)
        return {task: (self.heads[task](h) - 0.1).square().mean(1) for task in tasks}


class Deep(Heads):
    """Linear layers at one position."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()
        )

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x.mean(1))
        return found


class Positions(Deep):
    """The same layers at few positions."""

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x).mean(1)
        return found


class Chained(Deep):
    """Weights behind views, in part of one parameter, and a view that exchanges the sides."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(0.1 * torch.randn(2 * WIDTH, WIDTH))
        self.across = nn.Parameter(0.1 * torch.randn(WIDTH, WIDTH))

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        first, second = self.packed.view(2, WIDTH, WIDTH).unbind()
        return torch.tanh((h @ first.T + h @ second) @ self.across)


class Low(Deep):
    """A frozen layer with a sum of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 90, bias=False), nn.Linear(90, WIDTH, bias=False)

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        return torch.tanh(h + self.up(self.down(h)))


class Recomputed(Deep):
    """Activations that the backward makes again."""

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(super().features, x, use_reentrant=False)
        return found


class Words(Heads):
    """A table of many entries, of which a sample looks up few, twice one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    def features(self, x: Tensor) -> Tensor:
        entries = (x.flatten(1)[:, :4].abs() * 1e4).long() % VOCABULARY
        found: Tensor = torch.tanh(self.table(torch.cat([entries, entries[:, :1]], 1))).mean(1)
        return found


class Small(Heads):
    """Convolutions of few pixels and many channels, by groups too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(S, WIDTH, 3, padding=1, stride=2)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.apart = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.back = nn.ConvTranspose2d(WIDTH, WIDTH, 2)

    def features(self, x: Tensor) -> Tensor:
        h = self.first(x.view(-1, S, 4, 24)[..., :4])
        h = torch.tanh(self.conv(h))
        h = torch.tanh(self.apart(h))
        found: Tensor = torch.tanh(self.back(h)).flatten(2).mean(2)
        return found


class Tied(Heads):
    """A table that is looked up and multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    def features(self, x: Tensor) -> Tensor:
        entries = (x.flatten(1)[:, :2].abs() * 1e4).long() % VOCABULARY
        h = self.table(entries).mean(1)
        return torch.tanh(torch.tanh(h @ self.table.weight.T) @ self.table.weight)


class Penalised(Tied):
    """With a penalty on it in every loss."""

    def losses(self, x: Tensor, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        penalty = 1e-4 * self.table.weight.square().sum()
        return {task: loss + penalty for task, loss in super().losses(x, tasks).items()}


FACTORS: dict[type[Heads], set[str]] = {
    Deep: {"body.0.weight", "body.2.weight", "heads.a.weight", "heads.b.weight"},
    Positions: {"body.0.weight", "body.2.weight", "heads.a.weight", "heads.b.weight"},
    Chained: {"body.0.weight", "body.2.weight", "across", "heads.a.weight", "heads.b.weight"},
    Low: {"down.weight", "up.weight", "heads.a.weight", "heads.b.weight"},
    Recomputed: {"body.0.weight", "body.2.weight", "heads.a.weight", "heads.b.weight"},
    Words: {"table.weight", "heads.a.weight", "heads.b.weight"},
    Small: {"conv.weight", "heads.a.weight", "heads.b.weight"},
    Tied: {"table.weight", "heads.a.weight", "heads.b.weight"},
    Penalised: {"heads.a.weight", "heads.b.weight"},
}
Make = Callable[[], Heads]


def build(kind: Make, dtype: torch.dtype = torch.float64) -> tuple[Heads, mtu.Engine]:
    torch.manual_seed(0)
    net = kind().to(dtype)
    return net, mtu.Engine(net)


def batch(seed: int, dtype: torch.dtype = torch.float64, positions: int = S) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(N, positions, WIDTH, generator=drawn, dtype=torch.float64).to(dtype)


def kept_as_factors(memory: mtu.Memory) -> set[str]:
    block: Any = memory.held.block
    return {block.shared.names[j] for j in block.factors}


def fill(net: Heads, engine: mtu.Engine, memory: mtu.Memory) -> None:
    """Three steps, parameters moving."""
    for seed in range(3):
        clear(list(net.parameters()))
        engine.backward(net.losses(batch(seed)), mtu.OrthoGrad(0.3), forget=MASK, memory=memory)
        move(net)


def explicit(rows: mtu.Rows) -> Tensor:
    held = rows.jacobian()
    parts = []
    for p in rows.parameters.values():
        found = held[p] if p in held else torch.zeros(len(rows), *p.shape, dtype=p.dtype)
        parts.append(found.flatten(1).double())
    return torch.cat(parts, 1)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"keep": "conflicting"},
    {"per_task": True},
    {"tasks": ("b",)},
    {"basis": True, "rank": 5},
    {"budget": 700_000},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64},
]
