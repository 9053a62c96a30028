"""Steps of the loop: every method, any number of tasks, batches of anything."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import mtu_fast as mtu
from tests.unlearning.loop.scene import (
    NAMES,
    data,
    held_out,
    loader,
    losses,
    net,
    parameters,
    run,
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
