"""The audit of a removed class: its level is chance, or the retrained model's."""

from __future__ import annotations

from typing import Any

import pytest

import mtu_fast as mtu
from tests.unlearning.report import setting
from tests.unlearning.report.setting import audit, losses_of, nets, whole

pytestmark = pytest.mark.usefixtures("one_thread")


def of_class(*models: Any, **changes: Any) -> mtu.Audit:
    """An audit of class 2 removed from the task of classes."""
    x, label, depth = whole("forget")
    mine = label == 2
    gone = [(x[mine], label[mine], depth[mine])]
    return audit(*models, forget=gone, targets=["class"], removal="class", **changes)


def test_chance_is_counted_from_the_labels() -> None:
    original, unlearned, _ = nets()
    request = of_class(original, unlearned).data["request"]
    assert request["removal"] == "class" and request["chance"] == {"class": 1 / 3}
    share = float((whole("test")[1] == 2).double().mean())
    assert 0 < share < 1 and request["share"] == {"class": pytest.approx(share)}


def test_without_labels_chance_is_zero_and_said_to_be() -> None:
    original, unlearned, _ = nets()
    data = of_class(original, unlearned, labels=None).data
    assert data["request"]["chance"] == {"class": 0.0}
    assert data["request"]["share"] == {"class": None}
    assert any("Chance in task 'class' is taken as 0" in note for note in data["notes"])


@pytest.mark.parametrize("retrained", [True, False])
def test_the_loss_to_reach_is_that_of_the_reference(retrained: bool) -> None:
    models = nets()[: 3 if retrained else 2]
    found = audit(*models).data["loss_levels"]
    for task in setting.TASKS:
        model, split = (models[2], "forget") if retrained else (models[0], "test")
        assert found[task] == pytest.approx(float(losses_of(model, split, task).mean()))
    of_a_class = of_class(*models).data["loss_levels"]
    assert list(of_a_class) == (["class"] if retrained else [])
