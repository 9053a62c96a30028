"""`unlearn`: every method on every kind of request, and when it stops."""

from __future__ import annotations

import builtins
import copy
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import mtu_fast as mtu
from mtu_fast.unlearning.loop import DivergedError, progress
from tests.unlearning.loop.scene import (
    NAMES,
    data,
    held_out,
    loader,
    losses,
    net,
    parameters,
    sgd,
    sides,
    trained,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def constructible() -> list[type]:
    """Every method of the public surface that needs no argument."""
    found = []
    for name in mtu.__all__:
        kind = getattr(mtu, name)
        if isinstance(kind, type) and issubclass(kind, mtu.Method):
            try:
                kind()
            except TypeError:
                continue
            found.append(kind)
    return found


def run(model: nn.Module, method: Any = None, **more: Any) -> mtu.History:
    """A run without a progress bar, of SGD unless said otherwise."""
    arguments = {
        "method": method or mtu.OrthoGrad(0.5),
        "optimizer": sgd(model),
        "progress": False,
        **more,
    }
    return mtu.unlearn(model, **arguments)


def test_all_methods_are_found() -> None:
    names = {kind.__name__ for kind in constructible()}
    assert names >= {"OrthoGrad", "GradDiff", "PCGrad", "Mean"}
    assert names >= {"GradientAscent", "FineTune", "RandomLabels", "NablaTau"}


@pytest.mark.parametrize("targets", [None, ("a",)], ids=["full", "partial"])
@pytest.mark.parametrize("kind", constructible(), ids=lambda kind: kind.__name__)
def test_every_method_makes_a_step(kind: type, targets: tuple[str, ...] | None) -> None:
    model = trained(net())
    before = parameters(model)
    history = run(model, kind(), **sides(), targets=targets, validation=held_out(), max_steps=1)
    after = parameters(model)
    assert history.reason in ("max_steps", "level") and history.step == 1
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.5), mtu.PCGrad(), mtu.GradDiff(0.5)], ids=repr)
@pytest.mark.parametrize(("tasks", "targets"), [(1, None), (2, ("b",)), (5, None), (5, ("b", "e"))])
def test_any_number_of_tasks(method: Any, tasks: int, targets: tuple[str, ...] | None) -> None:
    """With labels missing for the last task; targets lose, and the other tasks of the same samples much less."""
    model = trained(net(tasks), tasks, steps=20 if tasks == 1 else 60)
    more = sides(tasks)
    history = run(model, method, **more, targets=targets, max_steps=25, clip=1.0)
    assert history.tasks == NAMES[:tasks] and history.targets == (targets or NAMES[:tasks])
    first, last = history.records[0], history.records[-1]
    rise = {task: last.forget_loss[task] - first.forget_loss[task] for task in history.tasks}
    lost = sum(rise[task] for task in history.targets) / len(history.targets)
    others = [rise[task] for task in history.tasks if task not in history.targets]
    assert lost > 0.2
    assert all(rise_of < lost / 2 for rise_of in others)


def test_one_task_may_come_as_a_tensor() -> None:
    model = trained(net(1), 1)
    given = {**sides(1), "losses": lambda model, batch: losses(model, batch)[0]["a"]}
    named = copy.deepcopy(model)
    assert run(model, **given, max_steps=3).tasks == ("loss",)
    run(named, **sides(1), max_steps=3)
    assert torch.equal(parameters(model), parameters(named))


def test_batches_may_be_anything() -> None:
    x, y = data(1, 12).tensors
    batches = [{"x": x[i : i + 4], "y": y[i : i + 4]} for i in (0, 4, 8)]
    model = trained(net(1), 1)
    history = run(
        model, forget=batches[:1], retain=batches[1:], max_steps=3,
        losses=lambda model, batch: losses(model, (batch["x"], batch["y"])),
    )  # fmt: skip
    assert history.step == 3


def test_a_class_is_forgotten() -> None:
    """Class-wise: the forget set is all of class 0 of task a; accuracy there is gone, and stays elsewhere."""
    whole = data(1)
    y = whole.tensors[1][:, 0]
    forget, retain = (y == 0).nonzero().flatten().tolist(), (y != 0).nonzero().flatten().tolist()
    model = trained(net(1), 1, steps=60)

    def accuracy(model: nn.Module, batches: Any) -> dict[str, float]:
        found = [(model(x)["a"].argmax(1) == y[:, 0]).double() for x, y in batches]
        return {"a": torch.cat(found).mean().item()}

    history = run(
        model, mtu.OrthoGrad(0.3), forget=loader(whole, forget), retain=loader(whole, retain), losses=losses,
        score=accuracy, max_steps=60, clip=1.0, optimizer=sgd(model, 0.5),
    )  # fmt: skip
    assert history.records[0].forget["a"] > 0.9 and history.records[-1].forget["a"] == 0.0
    assert history.records[-1].retain["a"] >= history.records[0].retain["a"] - 0.1


def test_random_labels_by_losses_of_their_own() -> None:
    """With true labels the forget loss falls, with drawn ones it rises."""

    def wrong(model: nn.Module, batch: Any) -> Any:
        x, y = batch
        return losses(model, (x, mtu.random_labels(y, 3)))

    rises = []
    for forget_losses in (None, wrong):
        model = trained(net())
        history = run(
            model, mtu.RandomLabels(), **sides(), forget_losses=forget_losses, max_steps=40
        )
        rises.append(history.records[-1].forget_loss["a"] - history.records[0].forget_loss["a"])
    assert rises[0] < 0 < 0.3 < rises[1]


# ---- the end -------------------------------------------------------------------------------------


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


# ---- what evaluations leave alone ----------------------------------------------------------------


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


# ---- not finite ----------------------------------------------------------------------------------


def poisoned(at: int, side: int, way: str) -> Callable[[nn.Module, Any], Any]:
    """Losses of which one value or gradient of the at-th step (from 1) is undefined, on the side (0 is retain)."""
    calls = [0]

    def function(model: nn.Module, batch: Any) -> Any:
        found, present = losses(model, batch)
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] == 2 * (at - 1) + side + 1:
                bad = torch.tensor([0.0] + [1.0] * (len(batch[0]) - 1), dtype=torch.float64)
                found["a"] = (
                    found["a"] / bad
                    if way == "loss"
                    else found["a"] + (found["a"] * (1 - bad) * 0).sqrt()
                )
        return found, present

    return function


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.5), mtu.GradDiff(0.5), mtu.PCGrad()], ids=repr)
@pytest.mark.parametrize(
    ("side", "way", "says"),
    [
        (
            0,
            "loss",
            r"in step 7, the loss of task 'a' is not finite for samples \[0\] of the retain batch",
        ),
        (
            1,
            "loss",
            r"in step 7, the loss of task 'a' is not finite for samples \[0\] of the forget batch",
        ),
        (1, "gradient", r"in step 7, .*not finite"),
    ],
)
def test_what_is_not_finite_puts_the_last_good_state_back(
    side: int, way: str, says: str, method: Any
) -> None:
    model = trained(net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    given = sides() | {"losses": poisoned(7, side, way)}
    with pytest.raises(
        RuntimeError, match=says + r".* after step 5.*Ways out.*learning rate"
    ) as caught:
        run(model, method, **given, max_steps=20, every=5, optimizer=optimizer)
    assert isinstance(caught.value, DivergedError)
    history = caught.value.history
    assert (history.reason, history.step, [r.step for r in history.records]) == (
        "not finite",
        5,
        [0, 5],
    )
    other = trained(net())
    again = torch.optim.Adam(other.parameters(), lr=0.01)
    run(other, method, **sides(), max_steps=5, every=5, optimizer=again)
    assert torch.equal(parameters(model), parameters(other))
    assert all(state["step"] == 5 for state in optimizer.state.values())


def failing(at: int, error: BaseException) -> Callable[[nn.Module, Any], Any]:
    """Losses that raise in the forward of the forget batch of the at-th step (from 1)."""
    calls = [0]

    def function(model: nn.Module, batch: Any) -> Any:
        calls[0] += torch.is_grad_enabled()
        if calls[0] == 2 * at:
            raise error
        return losses(model, batch)

    return function


class Gone(list[Any]):
    """Batches that come twice (an evaluation, a pass) and then no more."""

    left = 2

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        return iter(self[:] if self.left >= 0 else [])


def shared_root(at: int) -> Callable[[nn.Module, Any], Any]:
    """Losses of which all rows have an infinite gradient by a bias in the at-th step (from 1)."""
    calls = [0]

    def function(model: nn.Module, batch: Any) -> Any:
        found, present = losses(model, batch)
        calls[0] += torch.is_grad_enabled()
        if torch.is_grad_enabled() and calls[0] > 2 * (at - 1):
            bias = next(p for name, p in model.named_parameters() if name.endswith("bias"))
            found["a"] = found["a"] * (1 + (bias.sum() * 0).sqrt())
        return found, present

    return function


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda: {"losses": failing(7, ArithmeticError("mine"))}, ArithmeticError, "mine"),
        (lambda: {"losses": failing(7, KeyboardInterrupt("^C"))}, KeyboardInterrupt, "C"),
        (
            lambda: {"forget": Gone(sides()["forget"]), "every": 100},
            ValueError,
            "pass 2 of the loader gave no batch",
        ),
        (
            lambda: {"losses": shared_root(7)},
            DivergedError,
            r"in step 7, .*gradient of .*'a'.* is not finite",
        ),
    ],
    ids=["error", "interrupt", "loader", "stale map"],
)
def test_whatever_is_raised_puts_the_last_good_state_back(
    change: Callable[[], dict[str, Any]], error: type[BaseException], says: str
) -> None:
    """Model, optimizer, subspace and the user's generator are those of the last evaluation; no gradients are left."""

    def scene(**more: Any) -> tuple[Any, ...]:
        model, draw = trained(net()), torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

        def noisy(model: nn.Module, batch: Any) -> Any:
            torch.rand(1, generator=draw)
            return losses(model, batch)

        subspace = mtu.Subspace(16, every=2)
        given: dict[str, Any] = {
            **sides(), "forget_losses": noisy, "max_steps": 20, "every": 5, "optimizer": optimizer,
            "subspace": subspace, "generators": (g for g in (draw,)), **more,
        }  # fmt: skip
        if "losses" in more:
            given |= {
                "forget_losses": lambda model, batch: (
                    noisy(model, batch),
                    more["losses"](model, batch),
                )[1]
            }
        return model, optimizer, subspace, draw, given

    model, optimizer, subspace, draw, given = scene(**change())
    good = 0 if given["every"] == 100 else 5
    with pytest.raises(error, match=says):
        run(model, mtu.InterferenceAware(0.3), **given)
    assert all(p.grad is None for p in model.parameters())
    other, again, kept, drawn, given = scene(max_steps=good)
    if good:
        run(other, mtu.InterferenceAware(0.3), **given)
    assert torch.equal(parameters(model), parameters(other))
    assert len(optimizer.state) == len(again.state) and all(
        s["step"] == good for s in optimizer.state.values()
    )
    assert torch.equal(draw.get_state(), drawn.get_state())
    assert len(subspace) == len(kept) and (not good or subspace.full)
    for mine, theirs in zip(subspace.held.batches, kept.held.batches, strict=True):
        assert torch.equal(mine.roles.loss, theirs.roles.loss)


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.5), mtu.GradDiff(0.5), mtu.PCGrad()], ids=repr)
def test_losses_of_unlabelled_samples_do_not_matter(method: Any) -> None:
    def masked(model: nn.Module, batch: Any) -> Any:
        found, present = losses(model, batch)
        return {task: loss.where(present[task], torch.nan) for task, loss in found.items()}, present

    one, other = trained(net()), trained(net())
    run(one, method, **sides(), max_steps=6)
    run(other, method, **(sides() | {"losses": masked}), max_steps=6)
    assert (parameters(one) - parameters(other)).norm() <= 1e-12 * parameters(one).norm()


@pytest.mark.parametrize("path", [None, "run.pt"])
def test_other_settings_need_another_checkpoint(path: str | None, tmp_path: Path) -> None:
    model = trained(net())
    given = sides() | {
        "losses": poisoned(2, 0, "gradient"),
        "checkpoint": None if path is None else tmp_path / path,
    }
    with pytest.raises(
        DivergedError, match=r"\(task, sample\) to retain \[\('a', 0\), .*\] is not finite"
    ) as caught:
        run(model, mtu.OrthoGrad(0.5), **given, max_steps=5)
    assert ("new checkpoint path" in str(caught.value)) == (path is not None)


def test_a_step_into_nowhere_is_noticed() -> None:
    """A learning rate so large that the parameters overflow: found by the evaluation after the step."""
    model = trained(net())
    before = parameters(model)
    with pytest.raises(
        DivergedError, match=r"after step 1, the mean forget loss of \['a', 'b'\] is not finite"
    ):
        run(model, **sides(), max_steps=5, every=1, optimizer=sgd(model, math.inf))
    assert torch.equal(parameters(model), before)


# ---- history -------------------------------------------------------------------------------------


def test_history_as_json_and_as_a_plot(tmp_path: Path) -> None:
    model = trained(net())
    history = run(model, **sides(), validation=held_out(), max_steps=4, every=2)
    history.to_json(tmp_path / "h.json")
    stored = json.loads((tmp_path / "h.json").read_text())
    assert stored["reason"] == "max_steps" and stored["explanation"] == "all steps were made"
    assert [record["step"] for record in stored["records"]] == [0, 2, 4]
    assert mtu.History.from_dict(stored) == history
    figure = history.plot(tmp_path / "h.png")
    assert (tmp_path / "h.png").stat().st_size > 1000
    assert [axes.get_title() for axes in figure.axes] == ["a (target)", "b (target)"]
    forget = figure.axes[0].lines[0]
    assert list(forget.get_xdata()) == [0, 2, 4]
    assert list(forget.get_ydata()) == [record.forget["a"] for record in history.records]


@pytest.mark.parametrize("write", [mtu.History.to_json, mtu.History.plot])
def test_a_history_names_the_folder_that_is_not_there(
    write: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"path: there is no folder .*nodir for x.png; make it first, Path\(",
    ):
        write(mtu.History(("a",), ("a",)), tmp_path / "nodir" / "x.png")


def test_neither_bar_nor_plot_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("tqdm", "matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    model = trained(net())
    history = run(model, **sides(), max_steps=1, progress=True)
    with pytest.raises(ImportError, match=r"pip install 'mtu_fast\[demo\]'"):
        history.plot()


def test_the_bar_counts_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(net())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(model, **sides(), max_steps=6, every=3, progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "forget -" in shown and "retain -" in shown


def test_a_log_has_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps, of 11 seconds each by this clock: a line every third one, and one at the end."""
    clock = itertools.count(0, 11)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    run(trained(net()), **sides(), max_steps=10, every=5, progress=True)
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert "\r" not in shown and 4 <= len(lines) <= 5
    assert all(re.match(r"unlearn: step \d+/10, forget -.*, retain -", line) for line in lines)
    assert lines[-1].startswith("unlearn: step 10/10") and lines[-1].endswith("max_steps")


def test_nothing_is_shown_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run(trained(net()), **sides(), max_steps=2, progress=False)
    assert capsys.readouterr().err == ""


class Endless(IterableDataset[Any]):
    """Batches again and again, without an end."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(self.batches)


def test_a_retain_stream_without_an_end() -> None:
    """With a monitor, evaluations do not read it; steps are those of the loader gone through anew."""
    given = sides()
    given |= {side: list(given[side]) for side in ("forget", "retain")}
    ends, endless = trained(net()), trained(net())
    run(ends, **given, max_steps=7)
    stream = DataLoader(Endless(given["retain"]), batch_size=None)
    history = run(endless, **(given | {"retain": stream}), monitor=given["retain"], max_steps=7)
    assert history.reason == "max_steps" and history.step == 7
    torch.testing.assert_close(parameters(endless), parameters(ends), rtol=0, atol=0)


def test_the_direction_is_clipped_as_a_whole() -> None:
    """One step of SGD at rate 1 has the length of the clip, and the direction it has without."""
    model = trained(net())
    start, moved = parameters(model), []
    for clip in (None, 1e-3):
        one = trained(net())
        run(one, **sides(), max_steps=1, clip=clip, optimizer=sgd(one, 1.0))
        moved.append(parameters(one) - start)
    length: Tensor = moved[1].norm()
    assert length.item() == pytest.approx(1e-3, rel=1e-5)
    assert torch.cosine_similarity(moved[0], moved[1], dim=0).item() == pytest.approx(1.0, abs=1e-9)
