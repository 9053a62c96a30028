"""What an audit refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unlearning.report import setting
from tests.unlearning.report.setting import Batch, Net, audit, loader, nets

pytestmark = pytest.mark.usefixtures("one_thread")


def is_unseen(batch: Batch) -> bool:
    return any(torch.equal(x, batch[0]) for x, *_ in loader("test"))


def fewer_unseen(model: Net, batch: Batch) -> dict[str, Tensor]:
    """One task fewer on test data."""
    found = setting.losses(model, batch)
    return {"class": found["class"]} if is_unseen(batch) else found


def fewer_scores(model: Net, batches: list[Batch]) -> dict[str, float]:
    found = setting.score(model, batches)
    return {"class": found["class"]} if is_unseen(batches[0]) else found


def by_model(model: Net, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A mask that the model decides."""
    there = model.backbone[0].weight[0, 0] == nets()[0].backbone[0].weight[0, 0]
    return setting.losses(model, batch), {"class": torch.full((len(batch[0]),), bool(there))}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"forget": iter(loader("forget"))}, TypeError, "forget: found an iterator"),
        ({"retain": []}, ValueError, "retain: found no sample"),
        ({"targets": []}, ValueError, "targets: found no name, expected at least one"),
        ({"targets": "class"}, TypeError, "targets: found 'class', expected several names"),
        ({"targets": ["class", "color"]}, ValueError, r"unknown tasks \['color'\]"),
        (
            {"losses": lambda m, b: {"class": torch.zeros(())}},
            ValueError,
            r"found shapes \{'class': \(\)\}",
        ),
        ({"losses": lambda m, b: torch.zeros(3).tolist()}, TypeError, "losses: found list"),
        (
            {"losses": lambda m, b: {"class": torch.full((8,), math.nan)}},
            ValueError,
            "original model gives no finite",
        ),
        (
            {"losses": lambda m, b: {"a": torch.zeros(3), "b": torch.zeros(2)}},
            ValueError,
            "one value per sample",
        ),
        (
            {"losses": fewer_unseen, "score": fewer_scores},
            ValueError,
            "expected the same on all data",
        ),
        (
            {"losses": by_model},
            ValueError,
            "the unlearned model gives tasks, lengths or masks that differ",
        ),
        (
            {"losses": lambda m, b: setting.losses(m, b)["class"]},
            ValueError,
            r"losses \['loss'\].*called 'loss'",
        ),
        ({"score": lambda m, b: {"class": 1.0}}, ValueError, r"score gives tasks \['class'\]"),
        (
            {"score": lambda m, b: {"class": math.nan, "depth": 1.0}},
            ValueError,
            r"not finite for tasks \['class'\]",
        ),
        ({"score": lambda m, b: 1.0}, TypeError, "score: found float"),
        (
            {"present": lambda b: {"class": torch.ones(8)}},
            TypeError,
            r"present\['class'\]: found torch.float32",
        ),
        (
            {"present": lambda b: {"color": b[1] > 0}},
            ValueError,
            r"present: found unknown tasks \['color'\]",
        ),
        (
            {"present": lambda b: dict.fromkeys(setting.TASKS, b[1] > 9)},
            ValueError,
            "forget: no sample has a label",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        audit(**changes)
