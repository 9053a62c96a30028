"""The audit: its numbers are those of the metrics, and nothing of the models is changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

import mtu_fast as mtu
from mtu_fast.unlearning.metrics import QUANTILES, entropy, kl_divergence, membership
from tests.unlearning.report import setting
from tests.unlearning.report.setting import SIZES, audit, loader, losses_of, nets, whole

pytestmark = pytest.mark.usefixtures("one_thread")


def test_request_and_scores(full: mtu.Audit) -> None:
    assert full.data["request"] == {
        "kind": "full", "removal": "instance", "tasks": ["class", "depth"], "targets": ["class", "depth"],
        "samples": SIZES,
    }  # fmt: skip
    for name, net in zip(full.data["models"], nets(), strict=True):
        for split in SIZES:
            assert full.data["scores"][name][split] == setting.score(net.eval(), loader(split))


@pytest.mark.parametrize("split", list(SIZES))
@pytest.mark.parametrize("task", setting.TASKS)
def test_drift_is_that_of_the_losses(full: mtu.Audit, split: str, task: str) -> None:
    original, unlearned, _ = nets()
    change = (losses_of(unlearned, split, task) - losses_of(original, split, task)).numpy()
    found = full.data["drift"]["unlearned"][split][task]
    assert found["mean"] == pytest.approx(change.mean(), rel=1e-5)
    assert list(found["quantiles"]) == ["1%", "5%", "25%", "50%", "75%", "95%", "99%"]
    expected = np.quantile(change, QUANTILES).tolist()
    assert list(found["quantiles"].values()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert [one["index"] for one in found["worst"]] == np.argsort(-change, kind="stable")[
        :5
    ].tolist()
    assert (found["worst_class"] is not None) == (task == "class")


def test_histograms_count_every_sample_once(full: mtu.Audit) -> None:
    for split, n in SIZES.items():
        for task in setting.TASKS:
            found = full.data["histograms"][split][task]
            assert {model: sum(counts) for model, counts in found["counts"].items()} == {
                "unlearned": n,
                "retrained": n,
            }
            assert (
                found["edges"] == sorted(found["edges"])
                and found["edges"][0] <= 0 <= found["edges"][-1]
            )


def test_membership_and_distances_are_those_of_the_metrics(full: mtu.Audit) -> None:
    _, unlearned, retrained = (net.eval() for net in nets())
    sides = [losses_of(unlearned, split, "depth") for split in ("forget", "test")]
    found = full.data["membership"]["unlearned"]
    assert found["depth"]["loss"]["auc"] == pytest.approx(membership(*sides).auc)
    assert "entropy" not in found["depth"]  # outputs names the class task only
    with torch.no_grad():
        logits = [setting.outputs(net, whole("forget"))["class"] for net in (unlearned, retrained)]
        beside = setting.outputs(unlearned, whole("test"))["class"]
    by_entropy = membership(entropy(logits[0]), entropy(beside))
    assert found["class"]["entropy"]["accuracy"] == pytest.approx(by_entropy.accuracy)
    kl = full.data["distances"]["forget"]["class"]["kl"]["mean"]
    assert kl == pytest.approx(float(kl_divergence(logits[1], logits[0]).mean()), rel=1e-4)


def test_cosines_are_those_of_autograd(full: mtu.Audit) -> None:
    model = nets()[0].eval()
    found = full.data["cosines"]["original"]
    assert found["samples"] == {"forget": 4, "retain": 4}
    layer = found["layers"].index("backbone.0")
    parameters = list(model.backbone[0].parameters())

    def rows(split: str, task: str) -> Tensor:
        x, label, depth = (part[:4] for part in whole(split))
        each = setting.losses(model, (x, label, depth))[task]
        grads = [torch.autograd.grad(one, parameters, retain_graph=True) for one in each]
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]).double()
        return flat / flat.norm(dim=1, keepdim=True)

    for j, (s, t) in enumerate(found["pairs"]):
        expected = float((rows("forget", s) @ rows("retain", t).t()).mean())
        assert found["mean"][layer][j] == pytest.approx(expected, abs=1e-5)
    head = found["layers"].index("heads.depth")
    reached = [value is not None for value in found["mean"][head]]
    assert reached == [pair == ["depth", "depth"] for pair in found["pairs"]]


def test_nothing_of_the_models_is_changed() -> None:
    models = [*nets()]
    models[0].requires_grad_(False)
    models[1].backbone.eval()
    grads = torch.ones(3, 6)
    models[1].heads["class"].weight.grad = grads.clone()
    before = [copy.deepcopy(net.state_dict()) for net in models]
    modes = [[m.training for m in net.modules()] for net in models]
    state = torch.get_rng_state()
    shuffled = DataLoader(
        TensorDataset(*whole("retain")), 8, shuffle=True, generator=torch.Generator()
    )
    drawn = shuffled.generator.get_state()
    audit(*models, retain=shuffled, relearn=lambda p: torch.optim.SGD(p, lr=0.1), relearn_limit=2)
    for net, old in zip(models, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in net.state_dict().items())
    assert [[m.training for m in net.modules()] for net in models] == modes
    assert [all(p.requires_grad for p in net.parameters()) for net in models] == [False, True, True]
    assert not any(p.requires_grad for p in models[0].parameters())
    assert torch.equal(models[1].heads["class"].weight.grad, grads)
    assert [p.grad is None for p in models[2].parameters()] == [True] * len(
        list(models[2].parameters())
    )
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(
        shuffled.generator.get_state(), drawn
    )


def test_models_are_left_as_they_were_after_an_error_too() -> None:
    models = nets()
    with pytest.raises(ValueError, match="targets"):
        audit(*models, targets=["nothing"])
    assert all(net.training for net in models)


def test_the_kind_of_removal_is_checked_before_any_work() -> None:
    with pytest.raises(
        ValueError, match=r"removal: found 'clazz', expected one of 'instance', 'class'"
    ):
        audit(removal="clazz", losses=lambda model, batch: pytest.fail("a batch was read"))


def test_json_round_trip(full: mtu.Audit, tmp_path: Path) -> None:
    full.to_json(tmp_path / "audit.json")
    assert mtu.Audit.from_json(tmp_path / "audit.json") == full
    data = json.loads(
        (tmp_path / "audit.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert (data["schema"], data["version"]) == ("mtu_fast.audit", 1)
    (tmp_path / "later.json").write_text(json.dumps(data | {"version": 2}))
    with pytest.raises(ValueError, match=r"version 2, expected 'mtu_fast\.audit' version 1"):
        mtu.Audit.from_json(tmp_path / "later.json")


def test_an_audit_is_deterministic(full: mtu.Audit) -> None:
    again = audit().data
    assert {k: v for k, v in again.items() if k != "made"} == {
        k: v for k, v in full.data.items() if k != "made"
    }
