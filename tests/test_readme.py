"""The README's code runs as it stands: each block, and the changed loop, on a small net with two tasks."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtu_fast as mtu

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
(DIFF,) = re.findall(r"^```diff\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
N = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.heads = nn.ModuleDict({"seg": nn.Linear(8, 3), "depth": nn.Linear(8, 3)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        shared = self.backbone(x)
        return {task: head(shared) for task, head in self.heads.items()}


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(N, 5), {"seg": torch.randint(3, (N,)), "depth": torch.randint(3, (N,))}


def losses_of(model: nn.Module) -> dict[str, Tensor]:
    x, y = batch()
    return {task: F.cross_entropy(out, y[task], reduction="none") for task, out in model(x).items()}


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any) -> dict[str, float]:
    pairs = [(model(x), y) for x, y in loader]
    return {task: sum((o[task].argmax(1) == y[task]).double().mean().item() for o, y in pairs) / len(pairs)
            for task in ("seg", "depth")}  # fmt: skip


@pytest.fixture
def names() -> dict[str, Any]:
    """What a block finds: a net, its engine, and the losses of a step."""
    torch.manual_seed(0)
    model = Net()
    engine = mtu.Engine(model, params=model.backbone.parameters())
    loaders = {f"{name}_loader": [batch(), batch()] for name in ("forget", "retain", "validation")}
    memorised = [
        (x, {task: out.argmax(1) for task, out in model(x).items()})
        for x, _ in loaders["forget_loader"]
    ]
    loaders["forget_loader"] = memorised
    return {
        "torch": torch, "F": F, "copy": copy, "mtu": mtu, "model": model, "engine": engine, "accuracy": accuracy,
        "mask": torch.arange(N) < 3, "losses": losses_of(model), "loss_on_forget": losses_of(model),
        "loss_on_retain": losses_of(model), "w": torch.randn(2 * N), "v": torch.ones(2 * N), **loaders,
    }  # fmt: skip


def moved(model: nn.Module) -> bool:
    return all(p.grad is not None and bool(p.grad.norm() > 0) for p in model.backbone.parameters())


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.strip().splitlines()[0][:40])
def test_a_block_runs(
    code: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = [p.detach().clone() for p in names["model"].parameters()]
    exec(compile(code, "README.md", "exec"), names)
    stepped = not all(
        torch.equal(p, q) for p, q in zip(start, names["model"].parameters(), strict=True)
    )
    assert moved(names["model"]) or stepped
    assert "report" not in names or (tmp_path / "audit.html").stat().st_size > 10_000


def test_the_changed_loop_runs(names: dict[str, Any]) -> None:
    added = "".join(line[2:] + "\n" for line in DIFF.splitlines() if not line.startswith("-"))
    assert "engine.backward(" in added
    names["loader"] = [(*batch(), names["mask"])]
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)
    for task in ("seg", "depth"):
        names[f"{task}_loss"] = lambda out, y, task=task: F.cross_entropy(
            out[task], y[task], reduction="none"
        )
    exec(compile(added, "README.md", "exec"), names)
    assert moved(names["model"])
