"""The README runs as pasted: its block from nothing, and the changed loop on a small net with two tasks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtu_fast as mtu

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
DIFFS = [
    diff
    for page in ("README.md", "docs/index.md")
    for diff in re.findall(r"^```diff\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.M)
]
N = 8

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.fixture
def names() -> dict[str, Any]:
    """What a loop finds: a net, its engine, a loader, an optimizer and losses."""
    model = Net()
    forget = torch.arange(N) < 3
    found: dict[str, Any] = {
        "mtu": mtu,
        "model": model,
        "engine": mtu.Engine(model, params=model.backbone.parameters()),
        "losses": losses_of(model),
        "forget": forget,
        "loader": [(*batch(), forget)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    for task in ("seg", "depth"):
        found[f"{task}_loss"] = lambda out, y, task=task: F.cross_entropy(
            out[task], y[task], reduction="none"
        )
    return found


def moved(module: nn.Module) -> bool:
    return all(p.grad is not None and bool(p.grad.norm() > 0) for p in module.parameters())


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.strip().splitlines()[0][:40])
def test_a_block_runs_as_pasted(code: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec", dont_inherit=True), names)
    assert moved(names["model"])
    assert int(names["update"].rank) == 2 * 28  # every retain row of both tasks


@pytest.mark.parametrize("diff", DIFFS, ids=["README", "index"])
def test_both_sides_of_a_diff_run(diff: str, names: dict[str, Any]) -> None:
    lines = [line for line in diff.splitlines() if line]
    for other, needed in (("+", ".backward()"), ("-", "engine.backward(")):
        side = "".join(line[2:] + "\n" for line in lines if not line.startswith(other))
        assert needed in side
        names["model"].zero_grad()
        names["losses"] = losses_of(names["model"])
        exec(compile(side, "README.md", "exec", dont_inherit=True), names)
        assert moved(names["model"].backbone)


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    assert len(TEXT.splitlines()) <= 150
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)\)", prose):
        assert (ROOT / link).exists(), link
