"""An audit says what the models say, sample by sample, leaves them alone, and refuses what it cannot read."""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import mtu_fast as mtu
from mtu_fast.unlearning.metrics import QUANTILES, entropy, kl_divergence, membership
from mtu_fast.unlearning.report.audit import _indexed
from mtu_fast.unlearning.report.page import page
from tests.unlearning.report import setting
from tests.unlearning.report.document import Document
from tests.unlearning.report.setting import SIZES, Batch, Net, audit, loader, nets, whole

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def full() -> mtu.Audit:
    return audit()


def losses_of(model: Net, split: str, task: str) -> Tensor:
    with torch.no_grad():
        return setting.losses(model.eval(), whole(split))[task].double()


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


def test_a_shuffling_loader_gives_the_same_pairs_and_no_indices(full: mtu.Audit) -> None:
    shuffled = DataLoader(TensorDataset(*whole("retain")), 8, shuffle=True)
    found = audit(retain=shuffled, outputs=None).data
    for task in setting.TASKS:
        mine, theirs = (
            found["drift"]["unlearned"]["retain"][task],
            full.data["drift"]["unlearned"]["retain"][task],
        )
        assert mine["mean"] == pytest.approx(theirs["mean"], rel=1e-5)
        assert mine["quantiles"] == pytest.approx(theirs["quantiles"], rel=1e-4, abs=1e-6)
        assert [one["index"] for one in mine["worst"]] == [None] * 5
    assert any("order that may change: retain;" in note for note in found["notes"])


DATA = TensorDataset(*loader("retain", SIZES["retain"])[0])


@pytest.mark.parametrize(
    ("retain", "in_order"),
    [
        (loader("retain"), True),
        (DataLoader(DATA, 8), True),
        (
            DataLoader(
                DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 8, drop_last=False)
            ),
            True,
        ),
        (DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(30))), False),
        (
            DataLoader(
                DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(30)), 8, drop_last=False)
            ),
            False,
        ),
        (DataLoader(DATA, batch_sampler=[[3, 1, 2], [0, 4]]), False),
        (SimpleNamespace(__iter__=None), False),
    ],
)
def test_samples_have_an_index_only_where_the_order_is_known(retain: Any, in_order: bool) -> None:
    notes: list[str] = []
    assert _indexed({"retain": retain}, notes) == {"retain": in_order}
    assert bool(notes) is not in_order


def test_worst_samples_of_a_random_subset_have_no_index() -> None:
    subset = DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(30)))
    found = audit(retain=subset, outputs=None, cosine_samples=0).data["drift"]["unlearned"]
    assert {one["index"] for one in found["retain"]["class"]["worst"]} == {None}
    assert None not in {one["index"] for one in found["test"]["class"]["worst"]}


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


def samplers() -> list[tuple[str, DataLoader[Any], torch.Generator]]:
    """Loaders that draw their order from a generator, each in another place."""
    weights = torch.ones(len(DATA), dtype=torch.float64)
    kept = [torch.Generator().manual_seed(seed) for seed in range(5)]
    every = RandomSampler(DATA, generator=kept[1])
    subset = SubsetRandomSampler(range(30), generator=kept[2])
    weighted = WeightedRandomSampler(weights, 30, generator=kept[3])
    batches = BatchSampler(RandomSampler(DATA, generator=kept[4]), 8, drop_last=False)
    made = [
        ("loader", DataLoader(DATA, 8, shuffle=True, generator=kept[0])),
        ("random", DataLoader(DATA, 8, sampler=every)),
        ("subset", DataLoader(DATA, 8, sampler=subset)),
        ("weighted", DataLoader(DATA, 8, sampler=weighted)),
        ("batches", DataLoader(DATA, batch_sampler=batches)),
    ]
    return [(*pair, generator) for pair, generator in zip(made, kept, strict=True)]


@pytest.mark.parametrize("place", range(5))
def test_generators_of_samplers_stay_where_they_were(place: int, full: mtu.Audit) -> None:
    """After a first audit, since importing scikit-learn draws as well."""
    _, retain, generator = samplers()[place]
    before = generator.get_state()
    numpy, python = np.random.get_state()[1], random.getstate()

    def drawing(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        random.random()
        np.random.rand()
        return setting.losses(model, batch)

    audit(retain=retain, losses=drawing, outputs=None, cosine_samples=0)
    assert torch.equal(generator.get_state(), before)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)


def test_cosines_of_both_models_are_of_the_same_batches() -> None:
    original, _, _ = nets()
    shuffled = DataLoader(DATA, 8, shuffle=True)
    data = audit(original, copy.deepcopy(original), retain=shuffled, outputs=None).data
    assert data["cosines"]["original"] == data["cosines"]["unlearned"]


# ---- a removed class -----------------------------------------------------------------------------


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
