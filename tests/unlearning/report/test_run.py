"""The audit of what `mtu.unlearn` made, with its history, from the same functions and loaders."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from tests.unlearning.loop import scene
from tests.unlearning.report.document import Document

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS, TARGETS = ["a", "b", "c"], ["a", "b"]


def accuracy(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Of the labelled samples."""
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    right = {task: logits.argmax(1) == y[:, i] for i, (task, logits) in enumerate(model(x).items())}
    return {task: float(right[task][y[:, i] >= 0].double().mean()) for i, task in enumerate(TASKS)}


@pytest.fixture(scope="module")
def run() -> tuple[mtu.History, mtu.Audit]:
    """A partial-task run in the span of kept rows, the last task unlabelled for every fifth sample."""
    original = scene.trained(scene.net(3), 3)
    model, sides = copy.deepcopy(original), scene.sides(3)
    history = mtu.unlearn(
        model, scene.sgd(model), **sides, method=mtu.InterferenceAware(alpha=0.3), subspace=mtu.Subspace(24, every=1),
        targets=TARGETS, score=accuracy, max_steps=6, every=2, progress=False,
    )  # fmt: skip
    return history, mtu.audit(
        original, model, **sides, test=scene.held_out(3), score=accuracy, targets=TARGETS, history=history
    )  # fmt: skip


def test_the_audit_has_the_run_in_it(run: tuple[mtu.History, mtu.Audit]) -> None:
    history, found = run
    data = found.data
    assert data["request"]["kind"] == "partial" and data["request"]["targets"] == TARGETS
    assert [record["step"] for record in data["history"]] == [0, 2, 4, 6]
    assert data["history"] == history.to_dict()["records"]
    assert data["scores"]["original"]["forget"] == history.records[0].forget
    assert data["scores"]["unlearned"]["forget"] == history.records[-1].forget
    assert data["cost"]["steps"] == 6 and data["parameter_shift"] > 0
    labelled = {task: data["drift"]["unlearned"]["forget"][task]["samples"] for task in TASKS}
    assert labelled == {"a": 6, "b": 6, "c": 4}


def test_losses_and_their_drift_are_those_of_the_history(
    run: tuple[mtu.History, mtu.Audit],
) -> None:
    history, found = run
    for split in ("forget", "retain"):
        first, last = (getattr(history.records[i], f"{split}_loss") for i in (0, -1))
        for task in TASKS:
            assert found.data["drift"]["unlearned"][split][task]["mean"] == pytest.approx(
                last[task] - first[task]
            )


def test_json_and_page_have_history_and_cosines(
    run: tuple[mtu.History, mtu.Audit], tmp_path: Path
) -> None:
    _, found = run
    found.to_json(tmp_path / "audit.json")
    found.to_html(tmp_path / "audit.html")
    assert mtu.Audit.from_json(tmp_path / "audit.json") == found
    text = (tmp_path / "audit.html").read_text(encoding="utf-8")
    pictures = Document(text).all("svg")
    assert len(pictures) > 10 and "No history was given" not in text and "not asked for" not in text
    for name in ("forget", "retain", "forget loss", "retain loss", "drift"):
        assert f"<title>{name} over steps, by a, b, c.</title>" in text
    for model in ("original", "unlearned"):
        assert (
            f"<title>Mean gradient cosines by layer and task pair, {model} model.</title>" in text
        )
        means = found.data["cosines"][model]["mean"]
        pairs = found.data["cosines"][model]["pairs"]
        assert pairs == [[s, t] for s in TARGETS for t in TASKS]
        assert None not in means[found.data["cosines"][model]["layers"].index("backbone.0")]
