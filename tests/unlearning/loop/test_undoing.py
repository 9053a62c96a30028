"""What is not finite, and whatever is raised, puts the last good state back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from mtu_fast.unlearning.loop import DivergedError
from tests.unlearning.loop.scene import losses, net, parameters, run, sgd, sides, trained

pytestmark = pytest.mark.usefixtures("one_thread")


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
