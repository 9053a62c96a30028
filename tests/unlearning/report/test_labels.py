"""Samples without a label have no part in an audit, whichever way it is said that they have none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.unlearning.metrics import uis
from mtu_fast.unlearning.report.page import page
from tests.unlearning.report import setting
from tests.unlearning.report.document import Document
from tests.unlearning.report.setting import SIZES, Batch, Net, audit, loader, nets, whole

pytestmark = pytest.mark.usefixtures("one_thread")


def test_samples_without_a_label_are_left_out() -> None:
    def present(batch: Batch) -> dict[str, Tensor]:
        return {"depth": batch[0][:, 0] > 0}

    def poisoned(model: Net, batch: Batch) -> dict[str, Tensor]:
        found = setting.losses(model, batch)
        return found | {"depth": found["depth"].where(present(batch)["depth"], torch.zeros(()))}

    data = audit(present=present, losses=poisoned).data
    there = whole("retain")[0][:, 0] > 0
    found = data["drift"]["unlearned"]["retain"]
    assert (found["class"]["samples"], found["depth"]["samples"]) == (30, int(there.sum()))
    assert all(bool(there[one["index"]]) for one in found["depth"]["worst"])
    assert data["cosines"]["original"]["samples"]["retain"] >= 4


def same(a: mtu.Audit, b: mtu.Audit) -> bool:
    return a.data | {"made": None} == b.data | {"made": None}


def test_losses_may_name_the_labelled_samples_as_for_unlearn() -> None:
    def by_sign(batch: Batch) -> dict[str, Tensor]:
        return {"depth": batch[0][:, 0] > 0}

    def pair(model: Net, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return setting.losses(model, batch), by_sign(batch)

    def first(batch: Batch) -> dict[str, Tensor]:
        return {"depth": batch[0][:, 1] > 0}

    assert same(audit(losses=pair), audit(present=by_sign))
    both = audit(losses=pair, present=first, cosine_samples=0).data["drift"]["unlearned"]["retain"]
    x = whole("retain")[0]
    assert (
        both["depth"]["samples"] == int(((x[:, 0] > 0) & (x[:, 1] > 0)).sum())
        and both["class"]["samples"] == 30
    )


def test_one_task_may_have_no_name() -> None:
    def depth(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
        return {"loss": setting.score(model, batches)["depth"]}

    found = audit(
        losses=lambda m, b: setting.losses(m, b)["depth"], score=depth, outputs=None, labels=None
    ).data
    named = audit(outputs=None, labels=None).data
    assert found["request"]["targets"] == ["loss"]
    assert (
        found["drift"]["unlearned"]["test"]["loss"] == named["drift"]["unlearned"]["test"]["depth"]
    )


def test_relearning_uses_labelled_samples_only() -> None:
    original, unlearned, _ = nets()
    weights: list[Tensor] = []

    def watched(model: Net, batch: Batch) -> dict[str, Tensor]:
        found = setting.losses(model, batch)
        if torch.is_grad_enabled():
            found["depth"].register_hook(lambda gradient: weights.append(gradient.clone()))
        return found

    def present(batch: Batch) -> dict[str, Tensor]:
        return {"depth": torch.arange(len(batch[0])) > 2}

    data = audit(
        original, unlearned, losses=watched, present=present, targets=["depth"], cosine_samples=0,
        score=lambda model, batches: dict.fromkeys(setting.TASKS, float(model is original)),
        relearn=lambda p: torch.optim.SGD(p, lr=0.1), relearn_limit=1,
    ).data  # fmt: skip
    assert data["relearn"] == {"unlearned": None}
    assert [w.tolist() for w in weights] == [pytest.approx([0.0] * 3 + [0.2] * 5)]


# ---- a task without any label in a split ---------------------------------------------------------


def blank(split: str, task: str, **changes: Any) -> dict[str, Any]:
    """Arguments of an audit in which no sample of the split has a label for the task, and its score is 0 / 0."""
    bare = [part.tolist() for part, *_ in loader(split)]

    def present(batch: Batch) -> dict[str, Tensor]:
        return {task: torch.full((len(batch[0]),), batch[0].tolist() not in bare)}

    def score(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
        found = setting.score(model, batches)
        return found | ({task: math.nan} if batches[0][0].tolist() in bare else {})

    return {"present": present, "score": score, "cosine_samples": 4} | changes


@pytest.mark.parametrize("split", list(SIZES))
@pytest.mark.parametrize("task", setting.TASKS)
@pytest.mark.parametrize("alone", [False, True])
def test_a_task_without_labels_in_a_split_is_none_there(
    split: str, task: str, alone: bool, tmp_path: Path
) -> None:
    models = nets()[:2] if alone else nets()
    found = audit(
        *models, **blank(split, task, relearn=lambda p: torch.optim.SGD(p, lr=0.1), relearn_limit=1)
    )
    data, other = found.data, next(t for t in setting.TASKS if t != task)
    assert (
        data["drift"]["unlearned"][split][task] is None and data["histograms"][split][task] is None
    )
    assert {model: table[split][task] for model, table in data["scores"].items()} == dict.fromkeys(
        data["models"]
    )
    assert data["drift"]["unlearned"][split][other]["samples"] == SIZES[split]
    assert (
        f"No sample of {split} has a label for task {task!r}: its numbers there are left out."
        in data["notes"]
    )
    assert (
        data["uis"]["unlearned"] == pytest.approx(of_one(data["scores"], other))
        and data["relearn"] is not None
    )
    if not alone:
        assert set(data["gaps"]["retain"]) == set(data["tow"]) == {other}
    assert (data["membership"]["unlearned"][task]["loss"] is None) == (split != "retain")
    found.to_json(tmp_path / "audit.json")
    assert mtu.Audit.from_json(tmp_path / "audit.json") == found
    Document(page([data]))


def of_one(scores: dict[str, Any], task: str) -> float:
    tables = [
        {split: {task: row[task]} for split, row in scores[m].items()}
        for m in ("original", "unlearned")
    ]
    return uis(*tables)


def test_a_target_without_labels_to_forget_is_not_judged() -> None:
    data = audit(**blank("forget", "depth", targets=["depth"], relearn=torch.optim.SGD)).data
    assert data["verdict"]["removal"]["word"] == "not scored" and data["relearn"] is None
    assert (
        data["uis"] == dict.fromkeys(data["models"])
        and data["gaps"] is None
        and data["over_forgotten"] is None
    )
    assert any("no task to forget has labels in all of the data" in note for note in data["notes"])
    assert data["cosines"]["original"]["mean"][0] == [None, None]
    Document(page([data]))
