"""Runs of the protocol that settle: their rates, and which of their models they end with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import protocol
from benchmarks.data import Dataset
from benchmarks.methods import METHODS
from benchmarks.protocol import HeldOut, Run
from benchmarks.settling import Settling
from benchmarks.training import train
from mtu_fast.unlearning import metrics
from tests.benchmarks.unlearning_table.tiny import PROBLEM, TINY, split

STEPS, LR = 12, 1.5
TARGETS = PROBLEM.tasks


class Seen:
    """A look at every evaluation: its validation UIS by the metric itself, and its parameters."""

    def __init__(self, original: nn.Module, parts: Mapping[str, Dataset]) -> None:
        self.parts = parts
        self.before = self.table(original)
        self.uis: dict[int, float] = {}
        self.states: dict[int, Any] = {}

    def table(self, model: nn.Module) -> dict[str, dict[str, float]]:
        return {"forget": PROBLEM.scores(model, self.parts["forget"]),
                "test": PROBLEM.scores(model, self.parts["validation"])}  # fmt: skip

    def __call__(self, step: int, model: nn.Module) -> dict[str, Any]:
        self.uis[step] = metrics.uis(self.before, self.table(model), TARGETS)
        self.states[step] = copy.deepcopy(model.state_dict())
        return {}


class Scene:
    """A net that has memorised a little, and GradDiff on it."""

    def __init__(self) -> None:
        self.parts = split(0)
        self.protocol = replace(TINY.protocol, steps=STEPS, every=2)
        self.original = train(PROBLEM, self.parts["train"], self.protocol, 0, lambda _: None)

    def run(self, level: float, settling: bool = True) -> tuple[Run, Seen]:
        seen = Seen(self.original, self.parts)
        held_out = HeldOut(PROBLEM, self.original, self.parts, TARGETS)
        found = protocol.unlearn(
            PROBLEM, self.original, self.parts, TARGETS, METHODS["GradDiff"], 0.5, LR,
            dict.fromkeys(TARGETS, level), self.protocol, 0, lambda _: None, seen,
            settling=Settling(held_out, STEPS) if settling else None,
        )  # fmt: skip
        return found, seen


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()


@pytest.fixture(scope="module")
def first(scene: Scene) -> tuple[int, float]:
    """A step between the first and the last, and a level that a run comes down to there."""
    run, _ = scene.run(-1.0, settling=False)
    course = [(seen["step"], protocol.mean_of(seen["forget"], TARGETS)) for seen in run.history]
    step, score = next(found for found in course if found[1] < course[0][1])
    assert 0 < step < STEPS - 4
    return step, score


def test_the_rate_falls_to_zero_from_the_level_on(
    scene: Scene, first: tuple[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    right = torch.optim.SGD.step

    def step(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return right(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run, _ = scene.run(first[1])
    begun = first[0]
    falling = [LR * (STEPS - s) / (STEPS - begun) for s in range(begun, STEPS)]
    assert rates == pytest.approx([LR] * begun + falling, rel=1e-12)
    assert run.reached and run.steps == STEPS


def test_it_ends_with_the_best_model_at_the_level(scene: Scene, first: tuple[int, float]) -> None:
    begun, level = first
    run, seen = scene.run(level)
    down = [
        entry["step"]
        for entry in run.history
        if protocol.mean_of(entry["forget"], TARGETS) <= level
    ]
    assert down[0] == begun and list(seen.states) == list(range(0, STEPS + 1, 2))
    end = run.history[-1]["step"]
    # what comes after the end was no better, where it was at the level at all
    later = [s for s in seen.uis if s >= begun and _mean(scene, seen, s) <= level]
    assert seen.uis[end] == min(seen.uis[s] for s in later)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, seen.states[end][name])
    held_out = HeldOut(PROBLEM, scene.original, scene.parts, TARGETS)
    assert held_out.of(run) == pytest.approx(seen.uis[end], rel=1e-12)


def _mean(scene: Scene, seen: Seen, step: int) -> float:
    model = copy.deepcopy(scene.original)
    model.load_state_dict(seen.states[step])
    return protocol.mean_of(PROBLEM.scores(model, scene.parts["forget"]), TARGETS)


def test_a_run_that_does_not_come_down_is_one_without_settling(scene: Scene) -> None:
    run, seen = scene.run(-1.0)
    plain, _ = scene.run(-1.0, settling=False)
    assert not run.reached and run.history == plain.history and run.steps == STEPS
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, seen.states[STEPS][name])
        assert torch.equal(value, plain.model.state_dict()[name])


def test_what_is_better_is_kept_and_what_is_not_is_not() -> None:
    """Of three evaluations the second is the best, and a model is changed after each."""
    model, judged = nn.Linear(1, 1, bias=False), iter([3.0, 1.0, 2.0])
    settling = Settling(lambda net, forget: next(judged), 10)
    history: list[dict[str, Any]] = []
    for step in (4, 6, 8):
        nn.init.constant_(model.weight, float(step))
        history.append({"step": step, "forget": {}})
        settling.look(step, model, history)
    assert settling.begun == 4 and [settling.rate(s) for s in (4, 7)] == [1.0, 0.5]
    assert settling.put_back(model, history) == history[:2]
    assert model.weight.item() == 6.0
