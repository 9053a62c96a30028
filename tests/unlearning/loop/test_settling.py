"""Runs that settle: the rates, what the model is of at the end, and that they go on to the same bits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast.unlearning import metrics
from mtu_fast.unlearning.loop.history import REASONS, Record
from mtu_fast.unlearning.loop.settling import apart, falling, is_nearest, rest_of, slowed
from tests.helpers.models.base import MultiTask
from tests.unlearning.loop.interrupted import Interrupted, Scene
from tests.unlearning.loop.scene import held_out, losses, net, parameters, run, sgd, sides, trained

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = 5


def settled(
    settle: int | None, model: MultiTask | None = None, **more: Any
) -> tuple[mtu.History, Any]:
    model = trained(net()) if model is None else model
    given: dict[str, Any] = {
        **sides(), "optimizer": sgd(model, 0.2), "validation": held_out(), "max_steps": 500, "every": 2,
        "settle": settle,
    }  # fmt: skip
    return run(model, mtu.OrthoGrad(0.5), **{**given, **more}), model


class Watched(torch.optim.SGD):
    """Says at which rate each step was made, and what its parameters were then."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.rates: list[float] = []
        self.made: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        self.rates.append(self.param_groups[0]["lr"])
        found = super().step(closure)
        self.made.append(torch.cat([p.detach().flatten() for p in self.param_groups[0]["params"]]))
        return found


def watched(model: torch.nn.Module, lr: float = 0.05) -> Watched:
    return Watched(model.parameters(), lr=lr)


def test_the_rate_falls_to_zero_from_the_level_on() -> None:
    model = trained(net())
    optimizer = watched(model)
    history = run(
        model, mtu.OrthoGrad(0.5), optimizer=optimizer, **sides(), validation=held_out(), max_steps=500,
        every=EVERY, settle=20,
    )  # fmt: skip
    begun = history.reached
    assert begun is not None and len(optimizer.rates) == begun + 20
    assert optimizer.rates[:begun] == [0.05] * begun
    falling = [0.05 * (1 - k / 20) for k in range(20)]
    assert optimizer.rates[begun:] == pytest.approx(falling, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_scheduler_sees_its_own_rates() -> None:
    model = trained(net())
    optimizer = watched(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    history = run(
        model, mtu.OrthoGrad(0.5), optimizer=optimizer, scheduler=scheduler, **sides(), validation=held_out(),
        every=EVERY, settle=10, max_steps=500,
    )  # fmt: skip
    begun, made = history.reached, len(optimizer.rates)
    expected = [
        0.05 * 0.999**s * (1 - max(s - (begun or 0), 0) / 10) for s in range(made)
    ]  # the product of both
    assert optimizer.rates == pytest.approx(expected, rel=1e-9)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.05 * 0.999**made, rel=1e-9)


def test_rates_that_are_tensors() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    lr = torch.tensor(0.5)
    optimizer = torch.optim.Adam([p], lr=lr)
    with slowed(optimizer, 0.25):
        assert float(optimizer.param_groups[0]["lr"]) == 0.125
    assert optimizer.param_groups[0]["lr"] is lr and float(lr) == 0.5


class Halving(torch.optim.SGD):
    """Changes its own rate."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["lr"] /= 2
        return super().step(closure)


def test_an_optimizer_keeps_the_rate_that_it_set_itself() -> None:
    model = trained(net())
    optimizer = Halving(model.parameters(), lr=0.5)
    run(model, mtu.OrthoGrad(0.5), optimizer=optimizer, **sides(), max_steps=3)
    assert optimizer.param_groups[0]["lr"] == 0.5 / 8


class Rateless(torch.optim.Optimizer):
    """Moves by a rate of its own."""

    def __init__(self, parameters: Any, **more: Any) -> None:
        super().__init__(parameters, more)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p -= 0.05 * p.grad


@pytest.mark.parametrize("more", [{}, {"lr": None}], ids=str)
def test_an_optimizer_without_a_rate_makes_runs_that_do_not_settle(more: dict[str, Any]) -> None:
    model = trained(net())
    before = parameters(model)
    given = {"optimizer": Rateless(model.parameters(), **more), **sides(), "validation": held_out()}
    with pytest.raises(ValueError, match="settle: a group of Rateless has no lr"):
        run(model, mtu.OrthoGrad(0.5), **given, settle=5)
    assert torch.equal(parameters(model), before)
    run(model, mtu.OrthoGrad(0.5), **given, max_steps=2)
    assert not torch.equal(parameters(model), before)


def test_the_model_is_that_of_the_nearest_evaluation_at_the_level() -> None:
    first, _ = settled(None)
    model = trained(net())
    optimizer = watched(model, 0.2)
    history, _ = settled(40, model=model, optimizer=optimizer)
    begun = history.reached
    assert begun == first.step and history.reason == "level"
    assert history.records[-1].step == begun + 40
    down = [record for record in history.records if history.is_down(record)]
    nearest = min(down, key=lambda record: apart(history, record))
    assert history.step == nearest.step
    # less has been done to the rest than by the run that ended at once
    assert apart(history, nearest) < apart(history, down[0])
    assert history.step < len(optimizer.made)
    assert torch.equal(parameters(model), optimizer.made[history.step - 1])


@pytest.mark.parametrize("end", ["drift", "error"])
def test_what_ends_it_early_leads_back_to_the_nearest(end: str) -> None:
    whole, _ = settled(40)
    begun = whole.reached
    assert begun is not None
    cut = begun + 11
    down = [record for record in whole.records if begun <= record.step < cut]
    nearest = min(down, key=lambda record: apart(whole, record)).step
    assert begun < nearest < down[-1].step
    model = trained(net())
    optimizer = watched(model, 0.2)

    def broken(net: torch.nn.Module, batch: Any) -> Any:
        found, there = losses(net, batch)
        if len(optimizer.made) < cut:
            return found, there
        if end == "error":
            raise Interrupted
        return {task: loss + 10 for task, loss in found.items()}, there

    given = {"model": model, "optimizer": optimizer, "losses": broken, "max_drift": 5.0}
    if end == "error":
        with pytest.raises(Interrupted):
            settled(40, **given)
    else:
        history, _ = settled(40, **given)
        assert (history.reason, history.step, history.records[-1].step) == (
            "drift",
            nearest,
            cut + 1,
        )
    assert torch.equal(parameters(model), optimizer.made[nearest - 1])


@pytest.mark.parametrize("settle", [1, 7, 12])
def test_it_ends_where_the_rate_is_zero_whenever_evaluations_are_due(settle: int) -> None:
    """A rate of zero makes no step, and one below zero would undo the steps before."""
    model = trained(net())
    optimizer = watched(model, 0.2)
    history, _ = settled(settle, model=model, optimizer=optimizer, every=10)
    begun = history.reached
    assert begun is not None and begun % 10 == 0 and history.reason == "level"
    assert history.records[-1].step == len(optimizer.rates) == begun + settle
    assert min(optimizer.rates) == pytest.approx(0.2 / settle, rel=1e-12)


def record(step: int, forget: dict[str, float], validation: dict[str, float]) -> Record:
    return Record(step, forget, {}, {}, {}, {}, 0.0, validation)


def test_distance_is_uis_on_validation_data() -> None:
    """Of positive scores, but for the factor 100 / 2T."""
    history = mtu.History(("a", "b"), ("a",), {"a": 0.5})
    history.records = [
        record(0, {"a": 0.9, "b": 0.8}, {"a": 0.5, "b": 0.6}),
        record(1, {"a": 0.4, "b": 0.7}, {"a": 0.45, "b": 0.61}),
    ]
    tables = [{"forget": r.forget, "test": r.validation} for r in history.records]
    uis = metrics.uis(tables[0], tables[1], ["a"])
    assert 100 * apart(history, history.records[1]) / 4 == pytest.approx(uis, rel=1e-12)
    # of scores below zero, as minus the loss
    history.records = [record(0, {"a": -0.1}, {"a": -2.0}), record(1, {"a": -2.2}, {"a": -2.5})]
    assert apart(history, history.records[1]) == pytest.approx(0.5 / 2 + 0.2 / 2, rel=1e-12)


def test_scores_that_are_not_finite_decide_nothing() -> None:
    """A task without labels has none; one that the original had and a model lost is as far away as can be."""
    history, nan = mtu.History(("a", "b"), ("a",), {"a": 0.5}), math.nan
    history.records = [
        record(0, {"a": 0.9, "b": 0.8}, {"a": 0.5, "b": nan}),
        record(1, {"a": 0.4, "b": 0.6}, {"a": 0.45, "b": nan}),
        record(2, {"a": 0.4, "b": nan}, {"a": 0.45}),
    ]
    assert apart(history, history.records[1]) == pytest.approx(0.1 + 0.2 + 0.25, rel=1e-12)
    assert apart(history, history.records[2]) == math.inf


def test_the_distance_is_the_same_number_in_every_process() -> None:
    """Ranks decide by it, and a resumed run: sums in the order of a set would differ by its hashes."""
    names = [f"task {i}" for i in range(12)]
    ideal = {name: 0.1 + 0.07 * i for i, name in enumerate(names)}
    history = mtu.History(tuple(names), tuple(names[:5]), {})
    found = {name: score**2 for name, score in ideal.items()}
    history.records = [record(0, ideal, ideal), record(1, found, found)]
    total = 0.0
    for name in names:
        total += abs(found[name] - ideal[name]) / ideal[name]
    for name in names:
        total += abs(found[name] - ideal[name]) / ideal[name]
    assert apart(history, history.records[1]) == total
    # a table of scores may come in another order
    turned = dict(reversed(found.items()))
    assert apart(history, record(1, turned, turned)) == total


def test_what_is_retained_counts_where_it_falls() -> None:
    def made(*retained: float) -> mtu.History:
        found = mtu.History(("a",), ("a",), {"a": 0.5})
        found.records = [
            Record(i, {"a": 0.5}, {"a": r}, {}, {}, {}, 0.0, {"a": 0.6})
            for i, r in enumerate(retained)
        ]
        return found

    history = made(0.8, 0.6, 0.9)
    base = apart(history, history.records[0])
    assert apart(history, history.records[1]) == pytest.approx(base + 0.2 / 0.8, rel=1e-12)
    assert apart(history, history.records[2]) == base  # to rise is no loss
    # of two that are as near the later one counts
    assert is_nearest(made(0.8, 0.8)) and not is_nearest(made(0.8, 0.7))


def test_the_reason_says_whether_and_when_it_was_down() -> None:
    history, _ = settled(40)
    assert history.explanation.endswith(
        f"first at step {history.reached}; the model is that of step {history.step}"
    )
    early, _ = settled(40, max_steps=4)
    assert (
        early.explanation
        == "all steps were made, and not every target was down to the held-out level"
    )
    none, _ = settled(None, validation=sides()["forget"], levels=False)
    assert none.step == 0 and none.explanation.endswith(
        "at the held-out level before the first step"
    )
    # what ended a run otherwise says nothing of the level
    for reason, words in REASONS.items():
        other = replace(history, reason=reason)
        assert other.explanation.startswith(words)
        assert ("first at step" in other.explanation) is (reason == "level")


def test_max_steps_ends_it_earlier_at_the_rate_zero() -> None:
    history, _ = settled(None)
    limit = history.step + 7
    history, _ = settled(400, max_steps=limit)
    assert history.reason == "level" and history.records[-1].step == limit
    begun = history.reached
    assert begun is not None and rest_of(history, 400, limit) == limit
    assert [falling(s, begun, limit) for s in (begun, limit)] == [1.0, 0.0]
    assert rest_of(history, 5, limit) == begun + 5 and rest_of(history, None, limit) is None


def scene(path: Path | None, **more: Any) -> Scene:
    given = {"validation": held_out(), "max_steps": 200, "every": 2, "settle": 20}
    made = Scene(lambda: mtu.LevelledOrthoGrad(0.5), path, **{**given, "scheduler": None, **more})
    made.optimizer = sgd(made.model, 0.2)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[mtu.History, Tensor]:
    """Beside a run that writes checkpoints too."""
    found = scene(tmp_path_factory.mktemp("whole") / "run.pt")
    return found.run(), parameters(found.model)


@pytest.mark.parametrize("late", [-1, 6, 13, 19])
def test_a_run_goes_on_to_the_same_bits(
    late: int, whole: tuple[mtu.History, Tensor], tmp_path: Path
) -> None:
    """Stopped before the level, and at moments at which it is behind its nearest evaluation."""
    history, expected = whole
    begun = history.reached
    assert begun is not None and history.step > begun
    broken = scene(tmp_path / "run.pt")
    with pytest.raises(Interrupted):
        broken.run(begun + late)
    resumed = scene(tmp_path / "run.pt")
    found = resumed.run()
    assert torch.equal(parameters(resumed.model), expected)
    assert (found.step, found.reason, found.reached) == (history.step, "level", begun)
    assert [r.forget for r in found.records] == [r.forget for r in history.records]
    # a run that is over stays over
    over = scene(tmp_path / "run.pt")
    assert over.run().step == history.step
    assert torch.equal(parameters(over.model), expected)


def test_fewer_steps_than_were_made_end_it_at_the_level(
    whole: tuple[mtu.History, Tensor], tmp_path: Path
) -> None:
    """As a run of so many steps ends."""
    begun = whole[0].reached
    assert begun is not None
    with pytest.raises(Interrupted):
        scene(tmp_path / "run.pt").run(begun + 13)
    for limit in (begun, begun - 2):
        found = scene(tmp_path / "run.pt", max_steps=limit).run()
        assert found.reason == "level" and found.step >= begun


def test_other_settling_is_another_run(tmp_path: Path) -> None:
    scene(tmp_path / "run.pt").run()
    with pytest.raises(ValueError, match=r"settle"):
        scene(tmp_path / "run.pt", settle=30).run()


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"settle": 0}, ValueError, "settle: found 0"),
        ({"settle": 2.5}, TypeError, "settle: found"),
        ({"levels": False}, ValueError, "settle: OrthoGrad without levels goes on forgetting"),
        ({"method": mtu.NablaTau(), "levels": True}, ValueError, "a schedule of its own"),
    ],
)
def test_what_makes_no_sense(more: dict[str, Any], error: type[Exception], says: str) -> None:
    model = trained(net())
    given = {**sides(), "validation": held_out(), "max_steps": 5, "settle": 4, **more}
    with pytest.raises(error, match=says):
        run(model, given.pop("method", mtu.OrthoGrad(0.5)), **given)
