"""The unlearning benchmark in small: its net, its scores, its cases, its jobs, and what it writes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks import cases, methods, nets, unlearning, unlearning_times
from benchmarks.cases import Case, Choice
from benchmarks.data import Dataset, Samples, rooms
from benchmarks.methods import ENTRIES, METHODS, in_subspace, with_memory
from benchmarks.nets import DenseNet, dense_losses, dense_scores
from benchmarks.protocol import (
    Entry,
    Losses,
    Mask,
    Problem,
    Protocol,
    Situation,
    draw,
    mean_losses,
    plain,
    sample_losses,
    unlearn,
)
from benchmarks.training import divide, retrain
from benchmarks.unlearning_scores import attack, kept_rise
from mtu_fast import reference, subspace
from mtu_fast.unlearning import metrics

TASKS, CLASSES = rooms.TASKS, len(rooms.CLASSES)


def split(seed: int) -> dict[str, Dataset]:
    made = rooms.make_rooms({"train": 20, "validation": 6, "test": 7}, 8, 12, seed)
    return {**divide(made.pop("train"), 5), **made}


PROBLEM = Problem(
    "rooms",
    TASKS,
    ("segmentation",),
    partial(DenseNet, TASKS, CLASSES, 4),
    dense_losses,
    dense_scores,
)
TINY = Case(
    PROBLEM,
    Protocol(epochs=4, batch=8, retain_batch=4, forget_batch=3, steps=2, every=1, watch=False, grids={
        family: tuple((alpha, 0.1 * lr) for alpha, lr in grid[:2]) for family, grid in cases.DENSE.items()
    }),
    split, rounds=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> dict[str, Samples]:
    return cast(dict[str, Samples], split(0))


def quiet(_count: int) -> None:
    """Nobody watches."""


# ---- the net -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 15)])
def test_the_net_answers_every_pixel_at_any_resolution(height: int, width: int) -> None:
    out = DenseNet(TASKS, CLASSES, 8)(torch.rand(2, 3, height, width))
    assert {task: tuple(y.shape) for task, y in out.items()} == {
        "segmentation": (2, CLASSES, height, width), "depth": (2, 1, height, width), "normal": (2, 3, height, width)
    }  # fmt: skip
    assert (out["depth"] > 0).all()
    torch.testing.assert_close(out["normal"].norm(dim=1), torch.ones(2, height, width))


def test_tasks_that_are_not_asked_for_have_no_head() -> None:
    assert list(DenseNet(("segmentation", "depth"), 7)(torch.rand(1, 3, 8, 8))) == [
        "segmentation",
        "depth",
    ]


def test_losses_do_not_mix_samples(parts: dict[str, Samples]) -> None:
    model, batch = DenseNet(TASKS, CLASSES, 8), parts["retain"][:5]
    losses = dense_losses(model(batch.image), batch.labels)
    alone = dense_losses(model(batch.image[2:3]), batch[2:3].labels)
    assert list(losses) == list(TASKS)
    for task in TASKS:
        assert losses[task].shape == (5,)
        torch.testing.assert_close(losses[task][2:3], alone[task])


class Known(nn.Module):
    """Answers with given outputs, whatever the image; `at` counts the samples answered."""

    def __init__(self, outputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.outputs, self.at = outputs, 0

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        self.at += len(image)
        return {task: out[self.at - len(image) : self.at] for task, out in self.outputs.items()}


def test_scores_of_perfect_answers_are_one(parts: dict[str, Samples]) -> None:
    labels = parts["test"].labels
    hot = nn.functional.one_hot(labels["segmentation"], CLASSES).movedim(-1, 1).float()
    assert dense_scores(Known({**labels, "segmentation": hot}), parts["test"]) == dict.fromkeys(
        TASKS, 1.0
    )


def test_scores_by_chunks_are_those_of_all_pixels_at_once(
    parts: dict[str, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    test = parts["test"]
    labels = {task: label.clone() for task, label in test.labels.items()}
    # a chunk without depth, a sample without normals
    labels["depth"][:2], labels["normal"][3] = 0, 0
    with torch.no_grad():
        outputs = DenseNet(TASKS, CLASSES, 8)(test.image)
    monkeypatch.setattr(nets, "BATCH", 2)
    found = dense_scores(Known(outputs), Samples(test.image, labels, test.source))
    assert found == pytest.approx({
        "segmentation": metrics.mean_iou(outputs["segmentation"].argmax(1), labels["segmentation"], CLASSES),
        "depth": metrics.depth_scores(outputs["depth"], labels["depth"])["within_1.25"],
        "normal": metrics.normal_scores(outputs["normal"], labels["normal"])["within_30"],
    })  # fmt: skip


# ---- scores --------------------------------------------------------------------------------------


def test_the_attack_is_the_mean_over_target_tasks() -> None:
    told, untold = torch.arange(40.0), torch.arange(40.0).view(20, 2)
    losses = {
        "forget": {"a": told, "b": untold[:, 0]},
        "test": {"a": told + 100, "b": untold[:, 1]},
    }
    assert attack(losses, ("a",)) == 1.0
    both = metrics.membership(untold[:, 0], untold[:, 1]).auc
    assert attack(losses, ("a", "b")) == pytest.approx((1 + both) / 2) and both < 0.7


def test_what_is_kept_is_retain_and_the_other_tasks_of_f() -> None:
    zeros = {s: {"a": torch.zeros(2), "b": torch.zeros(2)} for s in ("forget", "retain", "test")}
    after = {"forget": {"a": torch.tensor([9.0, 9.0]), "b": torch.tensor([1.0, 2.0])},
             "retain": {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([5.0, 6.0])}}  # fmt: skip
    assert kept_rise(zeros, after, ("a",)).tolist() == [3, 4, 5, 6, 1, 2]
    assert kept_rise(zeros, after, ("a", "b")).tolist() == [3, 4, 5, 6]


def test_samples_without_a_label_have_no_loss_to_count(parts: dict[str, Samples]) -> None:
    test, model = parts["test"], DenseNet(TASKS, CLASSES, 8)
    whole = sample_losses(PROBLEM, model, test)
    labels = {task: label.clone() for task, label in test.labels.items()}
    labels["depth"][:2], labels["segmentation"][3], labels["normal"][:] = 0, -1, 0
    data = Samples(test.image, labels, test.source)
    found = sample_losses(PROBLEM, model, data)
    torch.testing.assert_close(found["depth"], whole["depth"][2:])
    torch.testing.assert_close(
        found["segmentation"], torch.cat([whole["segmentation"][:3], whole["segmentation"][4:]])
    )
    assert mean_losses(PROBLEM, model, data) == {
        task: pytest.approx(found[task].mean().item()) for task in ("segmentation", "depth")
    }


# ---- cases and methods ---------------------------------------------------------------------------


def test_every_method_has_a_name_of_its_own_and_equally_many_settings() -> None:
    assert len(METHODS) == len(ENTRIES)
    for grids in (cases.DENSE, cases.DIGITS):
        assert len({len(grids[entry.family]) for entry in ENTRIES}) == 1


@pytest.mark.parametrize("name", ["digits", "rooms"])
def test_the_splits_of_a_case_are_disjoint(name: str) -> None:
    found = cases.load(Choice(name, quick=True)).split(1)
    assert len(found["train"]) == len(found["forget"]) + len(found["retain"])
    used = torch.cat([
        found[s][:].source.flatten() for s in ("forget", "retain", "validation", "test")
    ])
    assert len(used.unique()) == len(used)
    assert torch.equal(found["train"][:].source.flatten(), used[: found["train"][:].source.numel()])


def test_a_folder_s_splits_are_drawn_by_the_seed(tmp_path: Path) -> None:
    for folder, count in (("train", 20), ("val", 7)):
        for kind, channels in (("image", (3,)), ("label", ()), ("depth", (1,))):
            (tmp_path / folder / kind).mkdir(parents=True)
            for i in range(count):
                np.save(
                    tmp_path / folder / kind / f"{i}.npy",
                    np.ones((4, 8, *channels), dtype=np.float32),
                )
    a, b = (cases.load(Choice("cityscapes", tmp_path)).split(seed) for seed in (0, 1))
    assert {name: len(part) for name, part in a.items()} == {
        "train": 20, "forget": 2, "retain": 18, "validation": 3, "test": 4
    }  # fmt: skip
    assert sorted(torch.cat([a[s][:].source for s in ("forget", "retain")]).tolist()) == list(
        range(20)
    )
    assert sorted(torch.cat([a[s][:].source for s in ("validation", "test")]).tolist()) == list(
        range(7)
    )
    assert a["train"][:].source.tolist() != b["train"][:].source.tolist()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("faces"), "expected one of digits, rooms"),
        (Choice("nyuv2"), "nyuv2 needs --root"),
        (Choice("rooms", Path("x")), "takes no --root"),
    ],
)
def test_a_wrong_choice_is_refused(choice: Choice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases.load(choice)


# ---- protocol and jobs ---------------------------------------------------------------------------


# of so small a net the subspace leaves little
@pytest.mark.filterwarnings("ignore:InterferenceAware")
@pytest.mark.parametrize("request_name", unlearning_times.REQUESTS)
@pytest.mark.parametrize("name", METHODS)
def test_engine_and_reference_take_the_same_step(
    name: str, request_name: str, parts: dict[str, Samples]
) -> None:
    model = PROBLEM.net().double()
    doubled = {}
    for s, d in parts.items():
        labels = {task: y.double() if y.is_floating_point() else y for task, y in d.labels.items()}
        doubled[s] = Samples(d.image.double(), labels, d.source)
    entry, generator = METHODS[name], torch.Generator().manual_seed(0)
    if name == "∇τ":  # at the τ and alpha that its schedule begins with, F being 5 of 20 samples
        tau = mean_losses(PROBLEM, model, doubled["validation"])
        exact = partial(reference.backward, method="nabla_tau", tau=tau, alpha=5 / 12)
        entry = replace(
            entry,
            reference=lambda params, losses, forget, alpha: exact(params, losses, forget=forget),
        )
    competitors = unlearning_times.sides(TINY, doubled, request_name, entry, model, generator)
    targets = PROBLEM.requests[request_name]
    batch, mask = entry.prepare(
        *draw(PROBLEM, doubled, targets, TINY.protocol, generator), generator
    )
    found = []
    for step in competitors.values():
        step(batch, mask)
        found.append(
            torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])
        )
    assert len(found) == 2 and all(0 < g.norm() < torch.inf for g in found)
    # whose reference has random rows in place of kept ones, for their time alone:
    if entry.begin not in (in_subspace, with_memory):
        # tests/loop/test_same_model.py compares the method itself
        assert (found[0] - found[1]).norm() <= 1e-8 * found[1].norm()


@pytest.mark.filterwarnings("ignore:InterferenceAware")
@pytest.mark.parametrize(
    ("name", "module", "refresh", "before"),
    [("Interference-aware", subspace, "orthonormal", 1), ("∇τ", methods, "mean_losses", 0)],
)
def test_every_timed_round_has_one_refresh(
    name: str, module: ModuleType, refresh: str, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = getattr(module, refresh), []

    def counted(*arguments: Any) -> Any:
        calls.append(refresh)
        return right(*arguments)

    monkeypatch.setattr(module, refresh, counted)
    monkeypatch.setattr(cases, "load", lambda choice: replace(TINY, rounds=2))
    cases.parts.cache_clear()
    unlearning_times.step_times(Choice("rooms"), "partial", name)
    cases.parts.cache_clear()
    assert len(calls) == before + 3  # the round that warms up, and two


def test_a_time_is_the_mean_over_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth step takes 100 ms longer: 20 a step."""
    steps: list[float] = []

    def begin(situation: Situation) -> Any:
        def step(losses: Losses, forget: Mask, present: Mapping[str, Tensor]) -> None:
            steps.append(0.1 if len(steps) % 5 == 2 else 0.0)
            time.sleep(steps[-1])

        return step

    entry = Entry("uneven", mtu.GradDiff, begin=begin, period=lambda protocol, parts: 5)
    monkeypatch.setitem(METHODS, "uneven", entry)
    monkeypatch.setattr(cases, "load", lambda choice: replace(TINY, rounds=2))
    cases.parts.cache_clear()
    found = unlearning_times.step_times(Choice("rooms"), "full", "uneven")[2]
    cases.parts.cache_clear()
    assert len(steps) == 15 and 20 <= found["fast"] < 100


def test_a_partial_retraining_sees_nothing_of_what_it_must_not(parts: dict[str, Samples]) -> None:
    labels = {task: label.clone() for task, label in parts["train"].labels.items()}
    labels["segmentation"][:5] = (labels["segmentation"][:5] + 1) % CLASSES
    other = {**parts, "train": Samples(parts["train"].image, labels, parts["train"].source)}
    a, b = (
        retrain(PROBLEM, p, "partial", TINY.protocol, 0, quiet).state_dict() for p in (parts, other)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    labels["depth"][:5] += 1
    c = retrain(PROBLEM, other, "partial", TINY.protocol, 0, quiet).state_dict()
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_hooks_change_the_batch_and_keep_state_over_a_run(parts: dict[str, Samples]) -> None:
    seen: list[Any] = []

    def prepare(batch: Samples, forget: Mask, generator: torch.Generator) -> tuple[Samples, Mask]:
        labels = {**batch.labels, "segmentation": torch.zeros_like(batch.labels["segmentation"])}
        return Samples(batch.image, labels, batch.source), {
            t: torch.zeros_like(m) for t, m in forget.items()
        }

    def begin(situation: Situation) -> Any:
        seen.append((situation.targets, situation.method))
        step = plain(situation)

        def counted(losses: Losses, forget: Mask, present: Mapping[str, Tensor]) -> object:
            seen.append(any(bool(mask.any()) for mask in forget.values()))
            return step(losses, forget, present)

        return counted

    entry = Entry("tried", lambda alpha: mtu.GradDiff(alpha), prepare=prepare, begin=begin)
    run = unlearn(
        PROBLEM,
        PROBLEM.net(),
        parts,
        ("depth",),
        entry,
        1.0,
        0.1,
        {"depth": -1.0},
        TINY.protocol,
        0,
        quiet,
    )
    assert seen[0][0] == ("depth",) and repr(seen[0][1]) == "GradDiff(alpha=1.0)"
    assert seen[1:] == [False] * run.steps == [False, False]


def test_it_runs_as_a_file_from_anywhere(tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(unlearning.__file__), "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, env=bare, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--times" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "Magic"], "Magic; expected some of"),
        (["--seeds", "0"], "at least one"),
        (["--requests", "full+half"], "request is 'full+half', expected full"),
        (["--data", "nyuv2"], "needs --root"),
        (["--data", "nyuv2", "--root", "/nowhere"], "is no folder"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        unlearning.main(options)
    assert message in capsys.readouterr().err
