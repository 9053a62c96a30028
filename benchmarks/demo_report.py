"""The demo's report: one audit a request of OrthoGrad's chosen run, on one page and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks.data import Samples
from benchmarks.scenes import scene_losses, scene_scores
from mtu_fast.unlearning.report import write_html

BATCH = 100  # scenes


class Batches(list[Samples]):
    """Scenes in batches; `whole` for scores that do not add up over batches."""

    def __init__(self, scenes: Samples) -> None:
        super().__init__(scenes[start : start + BATCH] for start in range(0, len(scenes), BATCH))
        self.whole = scenes


def audit_run(
    original: nn.Module, unlearned: nn.Module, retrained: nn.Module, data: Mapping[str, Samples],
    targets: tuple[str, ...], history: list[dict[str, Any]], cost: Mapping[str, Any], title: str, seed: int,
) -> mtu.Audit:  # fmt: skip
    """Everything of `mtu.audit` for one run."""
    return mtu.audit(
        original, unlearned, retrained,
        forget=Batches(data["forget"]), retain=Batches(data["retain"]), test=Batches(data["test"]),
        losses=lambda model, batch: scene_losses(_logits(model, batch), batch.labels), outputs=_logits,
        score=lambda model, batches: scene_scores(model, batches.whole), labels=_classes, targets=targets,
        history=SimpleNamespace(records=history), relearn=lambda parameters: torch.optim.Adam(parameters, lr=2e-4),
        relearn_limit=60,
        cost={"ms a step": cost["ms"], "peak MiB of a step": cost["mib"]}, title=title, seed=seed,
    )  # fmt: skip


def write_report(audits: Mapping[str, mtu.Audit], folder: Path) -> list[Path]:
    """The page of all requests, and the numbers of each; the files written."""
    page, numbers = (
        folder / "unlearning.html",
        {name: folder / f"audit_{name}.json" for name in audits},
    )
    write_html(
        page,
        list(audits.values()),
        "Unlearning handwritten digits: what was removed, and what else moved",
    )
    for name, each in audits.items():
        each.to_json(numbers[name])
    return [page, *numbers.values()]


def _logits(model: nn.Module, batch: Samples) -> dict[str, Tensor]:
    return cast(dict[str, Tensor], model(batch.image))


def _classes(batch: Samples) -> dict[str, Tensor]:
    return {task: label for task, label in batch.labels.items() if label.dim() == 1}
