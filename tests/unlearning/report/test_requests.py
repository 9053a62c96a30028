"""Partial requests, no retrained model, history, cost and relearning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mtu_fast.unlearning.report.page import page
from tests.unlearning.report import setting
from tests.unlearning.report.document import Document
from tests.unlearning.report.setting import Batch, audit, nets, whole

pytestmark = pytest.mark.usefixtures("one_thread")


def test_scores_that_are_minus_a_loss_have_no_uis_but_a_note() -> None:
    def minus(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
        whole = [torch.cat(part) for part in zip(*batches, strict=True)]
        return {
            task: -float(loss.mean()) for task, loss in setting.losses(model, tuple(whole)).items()
        }

    data = audit(score=minus, cosine_samples=0).data
    assert data["uis"] == dict.fromkeys(data["models"]) and data["mean_gap"] > 0
    said = [
        note
        for note in data["notes"]
        if note.startswith("UIS left out: the original model's test score")
    ]
    assert len(said) == 1 and "scores must be positive" in said[0]
    Document(page([data]))


def test_partial_requests_and_no_retrained_model() -> None:
    data = audit(*nets()[:2], targets=["depth"], outputs=None, labels=None).data
    assert data["request"]["kind"] == "partial" and data["models"] == ["original", "unlearned"]
    assert [data[name] for name in ("gaps", "mean_gap", "tow", "over_forgotten", "distances")] == [
        None
    ] * 5
    assert data["cosines"]["original"]["pairs"] == [["depth", "class"], ["depth", "depth"]]
    assert "No retrained model was given" in data["verdict"]["text"]


def test_what_cannot_be_scored_is_none_with_a_note() -> None:
    data = audit(
        forget=[tuple(part[:3] for part in whole("forget"))],
        score=lambda m, b: {"class": 0.0, "depth": 2.0},
    )
    assert data.data["membership"]["unlearned"]["class"]["loss"] is None
    assert data.data["uis"]["unlearned"] is None and data.data["tow"] is None
    notes = " ".join(data.data["notes"])
    assert all(
        part in notes for part in ("found 3 forget", "test score of task 'class' is 0", "fractions")
    )
    assert data.data["verdict"]["attack"]["word"] == "not tested"


@dataclass
class Record:
    step: int
    forget: dict[str, float]
    seconds: float


def test_history_and_cost() -> None:
    history = SimpleNamespace(
        records=[Record(0, {"class": 1.0}, 1.0), Record(10, {"class": math.nan}, 3.5)]
    )
    data = audit(
        history=history, cost={"peak MiB": {"fast": 3, "reference": math.inf}}, cosine_samples=0
    ).data
    assert data["history"][1] == {"step": 10, "forget": {"class": None}, "seconds": 3.5}
    assert data["cost"] == {
        "peak MiB": {"fast": 3, "reference": None}, "steps": 10, "seconds": 2.5, "ms a step, from the history": 250.0
    }  # fmt: skip
    assert data["cosines"] is None
    for wrong in (3, [3], [{"loss": 1.0}]):
        with pytest.raises(TypeError, match="history"):
            audit(history=wrong, cosine_samples=0)


def test_relearning_counts_from_either_model() -> None:
    original, _, retrained = nets()
    with torch.no_grad():
        retrained.heads["depth"].bias.fill_(100.0)  # far off, and the steps have no length
    data = audit(
        original, original, retrained, relearn=lambda p: torch.optim.SGD(p, lr=0.0), relearn_limit=1
    ).data
    assert data["relearn"] == {"unlearned": 0, "retrained": None}
