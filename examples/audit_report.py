"""Unlearn with the loop and write an audit: what was removed, what else moved, as JSON and one HTML page.

`mtu.unlearn` steps until the forget scores are those of data never seen. `mtu.audit` then compares the
original and the unlearned model: scores, membership inference, drift of single samples, gradient cosines.
Needs scikit-learn (`pip install 'mtu_fast[demo]'`).

    python examples/audit_report.py [--out out/audit] [--tiny]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

import mtu_fast as mtu

TASKS = ("sign", "size")


class Net(nn.Module):
    """A shared backbone and a linear head per task."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.heads = nn.ModuleDict({task: nn.Linear(width, 2) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits [N, 2] of each task."""
        shared = self.backbone(x)
        return {task: head(shared) for task, head in self.heads.items()}


def dataset(count: int) -> TensorDataset:
    """Points `[8]` with two labels; a fifth of the labels are noise, which only memory can get right."""
    x = torch.randn(count, 8)
    labels = torch.stack([x[:, 0] > 0, x[:, 1].abs() > 0.67])
    labels ^= torch.rand(labels.shape) < 0.2
    return TensorDataset(x, *labels.long())


def task_losses(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """Unreduced losses, one value per sample: {task: [N]}."""
    x, *labels = batch
    out = model(x)
    return {
        task: F.cross_entropy(out[task], y, reduction="none")
        for task, y in zip(TASKS, labels, strict=True)
    }


@torch.no_grad()
def accuracy(model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """Share of correct predictions, {task: 0..1}."""
    right = dict.fromkeys(TASKS, 0)
    count = 0
    for x, *labels in loader:
        out = model(x)
        count += len(x)
        for task, y in zip(TASKS, labels, strict=True):
            right[task] += int((out[task].argmax(1) == y).sum())
    return {task: right[task] / count for task in TASKS}


def train(model: nn.Module, loader: Iterable[Any], epochs: int) -> None:
    """Train until the noisy labels are known too."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            torch.stack([
                loss.mean() for loss in task_losses(model, batch).values()
            ]).sum().backward()
            optimizer.step()


def main(argv: Sequence[str] | None = None) -> mtu.Audit:
    """Train, unlearn, audit; write audit.json and audit.html."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/audit"))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--tiny", action="store_true", help="the size of a test")
    args = parser.parse_args(argv)
    if args.tiny:
        args.samples, args.epochs = 64, 60

    torch.manual_seed(0)
    data, unseen = dataset(args.samples), dataset(args.samples)
    model = Net(width=64)
    train(model, DataLoader(data, batch_size=32, shuffle=True), args.epochs)

    cut = args.samples // 8
    forget = DataLoader(Subset(data, range(cut)), batch_size=16)
    retain = DataLoader(Subset(data, range(cut, args.samples)), batch_size=32)
    held_out = Subset(unseen, range(args.samples // 2))
    validation = DataLoader(held_out, batch_size=32)
    test = DataLoader(Subset(unseen, range(args.samples // 2, args.samples)), batch_size=32)

    original = copy.deepcopy(model.eval())
    history = mtu.unlearn(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        forget=forget,
        retain=retain,
        validation=validation,
        losses=task_losses,
        score=accuracy,
        method=mtu.OrthoGrad(alpha=0.3),
        params=model.backbone.parameters(),
        max_steps=400,
        settle=60,
        max_drift=0.5,
        every=2,
        clip=1.0,
        progress=False,
    )
    print(f"stopped after {history.step} steps: {history.reason}")

    report = mtu.audit(
        original,
        model,
        forget=forget,
        retain=retain,
        test=test,
        losses=task_losses,
        score=accuracy,
        params=lambda net: net.get_submodule("backbone").parameters(),
        history=history,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    report.to_json(args.out / "audit.json")
    report.to_html(args.out / "audit.html")
    print(f"wrote {args.out / 'audit.html'}")
    return report


if __name__ == "__main__":
    main()
