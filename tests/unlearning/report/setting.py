"""A small two-task setting to audit: models, loaders, and the functions that read them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import mtu_fast as mtu

TASKS = ("class", "depth")
SIZES = {"forget": 12, "retain": 30, "test": 24}
Batch = tuple[Tensor, Tensor, Tensor]


class Net(nn.Module):
    """A backbone with BatchNorm and dropout, a head of three classes and one of a number."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5)
        )
        self.heads = nn.ModuleDict({"class": nn.Linear(6, 3), "depth": nn.Linear(6, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.backbone(x)
        return {task: head(h) for task, head in self.heads.items()}


def loader(split: str, batch: int = 8) -> list[Batch]:
    """Batches (x, class, depth)."""
    n, generator = SIZES[split], torch.Generator().manual_seed(list(SIZES).index(split))
    x = torch.randn(n, 4, generator=generator)
    whole = (x, torch.randint(0, 3, (n,), generator=generator), x.sum(1))
    return list(zip(*(part.split(batch) for part in whole), strict=True))


def whole(split: str) -> Batch:
    """All of it as one batch."""
    return loader(split, SIZES[split])[0]


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    out = model(batch[0])
    return {
        "class": functional.cross_entropy(out["class"], batch[1], reduction="none"),
        "depth": (out["depth"].squeeze(1) - batch[2]).abs(),
    }


def score(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    right, near, count = 0.0, 0.0, 0
    for x, label, depth in batches:
        out = model(x)
        right += float((out["class"].argmax(1) == label).sum())
        near += float(((out["depth"].squeeze(1) - depth).abs() < 1.5).sum())
        count += len(x)
    return {"class": right / count, "depth": near / count}


def outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"class": model(batch[0])["class"]}


def labels(batch: Batch) -> dict[str, Tensor]:
    return {"class": batch[1]}


def nets() -> tuple[Net, Net, Net]:
    """Original, unlearned (near it) and retrained."""
    original = Net(0)
    unlearned = copy.deepcopy(original)
    with torch.no_grad():
        for p in unlearned.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return original, unlearned, Net(1)


def audit(*models: nn.Module, **changes: Any) -> mtu.Audit:
    """An audit of these models (all three by default), with some arguments changed."""
    given = {split: loader(split) for split in SIZES} | {
        "losses": losses, "score": score, "outputs": outputs, "labels": labels, "cosine_samples": 4,
    } | changes  # fmt: skip
    return mtu.audit(*(models or nets()), **given)


def losses_of(model: Net, split: str, task: str) -> Tensor:
    """The losses of a task on a whole split, float64."""
    with torch.no_grad():
        return losses(model.eval(), whole(split))[task].double()
