"""When a run ends: at the held-out level, by drift, after passes; and what evaluations leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from tests.unlearning.loop.scene import (
    data,
    held_out,
    loader,
    losses,
    net,
    parameters,
    run,
    sides,
    trained,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_stops_at_the_held_out_level() -> None:
    model = trained(net())
    original = copy.deepcopy(model)
    history = run(
        model, mtu.GradDiff(0.5), **sides(), validation=held_out(), max_steps=500, every=5
    )
    assert history.reason == "level" and 0 < history.step < 500
    x, y = data(2, 12, seed=2).tensors
    found, present = losses(original, (x, y))
    for task in "ab":
        assert history.level[task] == pytest.approx(
            -found[task][present[task]].mean().item(), rel=1e-12
        )
        assert history.records[-1].forget[task] <= history.level[task]
    assert any(history.records[-2].forget[task] > history.level[task] for task in "ab")


def test_only_targets_count_for_the_level() -> None:
    model = trained(net())
    history = run(
        model,
        mtu.GradDiff(0.5),
        **sides(),
        targets=["a"],
        validation=held_out(),
        max_steps=500,
        every=5,
    )
    assert history.reason == "level" and set(history.level) == {"a"}
    assert history.records[-1].forget["b"] > -1.0


def test_what_was_never_learned_stops_at_once() -> None:
    model = trained(net())
    before = parameters(model)
    history = run(model, **(sides() | {"forget": held_out()}), validation=held_out())
    assert (history.reason, history.step, len(history.records)) == ("level", 0, 1)
    assert torch.equal(parameters(model), before)


@pytest.mark.parametrize("bound", [0.3, {"a": 0.3}])
def test_drift_puts_the_last_good_state_back(bound: Any) -> None:
    model = trained(net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    history = run(
        model,
        mtu.GradientAscent(),
        **sides(),
        max_drift=bound,
        max_steps=500,
        every=4,
        optimizer=optimizer,
    )
    assert history.reason == "drift"
    over, good = history.records[-1], history.records[-2]
    bounded = "ab" if isinstance(bound, float) else "a"
    assert (
        max(over.drift[task] for task in bounded) > 0.3 >= max(good.drift[task] for task in bounded)
    )
    assert history.step == good.step == over.step - 4
    other = trained(net())
    again = torch.optim.Adam(other.parameters(), lr=0.02)
    run(other, mtu.GradientAscent(), **sides(), max_steps=good.step, every=4, optimizer=again)
    assert torch.equal(parameters(model), parameters(other))
    for mine, theirs in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


def test_other_tasks_of_forget_samples_count_as_retained() -> None:
    """Ascent on task a of samples whose task b shares the backbone: b drifts there first."""
    model = trained(net())
    history = run(model, mtu.GradientAscent(), **sides(), targets=["a"], max_steps=12, every=4)
    for record in history.records[1:]:
        first = history.records[0]
        on_forget = record.forget_loss["b"] - first.forget_loss["b"]
        on_retain = record.retain_loss["b"] - first.retain_loss["b"]
        assert record.drift["b"] == max(on_forget, on_retain)
        assert record.drift["a"] == record.retain_loss["a"] - first.retain_loss["a"]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 5), (3, 15)])
def test_epochs_are_passes_over_retain(epochs: int, steps: int) -> None:
    model = trained(net())
    history = run(model, **sides(), epochs=epochs, every=4)
    assert (history.reason, history.step) == ("epochs", steps)  # 18 samples by 4
    assert history.records[-1].step == steps


def test_nabla_tau_runs_its_own_schedule() -> None:
    """18 retain samples by 4 and 6 to forget by 3: E = int(6 · 5 / (2 · 2)) = 7 passes over the two forget batches."""
    model, method = trained(net()), mtu.NablaTau()
    history = run(model, method, **sides(), validation=held_out(), every=4)
    assert (history.reason, history.step, method.epochs) == ("epochs", 14, 7)
    assert method.alpha == pytest.approx(5 / 3 * 6 / 24 / 7, rel=1e-12)  # of the last epoch
    assert set(method.tau) == {"a", "b"}


def test_evaluations_do_not_change_the_run() -> None:
    """With dropout and shuffling, evaluating often gives the model that evaluating seldom gives, to the bit."""
    models = []
    for every in (1, 7):
        torch.manual_seed(4)
        model = trained(net(dropout=0.3))
        model.backbone[0].eval()
        torch.manual_seed(5)
        run(model, **sides(shuffle=True), max_steps=14, every=every)
        assert model.backbone[2].training and not model.backbone[0].training
        models.append(parameters(model))
    assert torch.equal(*models)


def test_monitor_is_what_evaluations_see() -> None:
    model, seen = trained(net()), []

    def counted(model: nn.Module, batch: Any) -> Any:
        if not torch.is_grad_enabled():
            seen.append(len(batch[0]))
        return losses(model, batch)

    whole = data()
    run(model, **(sides() | {"losses": counted}), monitor=loader(whole, [8], 1), max_steps=1)
    assert seen == [3, 3, 1] * 2
