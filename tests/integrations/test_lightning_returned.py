"""What `training_step` returns: what `unlearn` gave it, as it is, or nothing; anything else is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from tests.helpers.truth import relative_error
from tests.integrations.lightnings import (
    MARKS,
    QUIET,
    Automatic,
    Leaving,
    Manual,
    Unlearning,
    fit,
    lightning,
)
from tests.integrations.small import (
    METHODS,
    RATE,
    Texts,
    batches,
    build,
    losses_of,
    moved,
    plain_step,
    weights,
)

pytestmark = MARKS


MADE: dict[str, Callable[[Tensor], Any]] = {
    "multiplied": lambda loss: 0.1 * loss,
    "divided": lambda loss: loss / 2,
    "a number added": lambda loss: loss + 1.0,
    "in a dictionary": lambda loss: {"loss": loss - loss.detach()},
    "detached": lambda loss: loss.detach(),
    "multiplied and detached": lambda loss: 0.1 * loss.detach(),
    "another one": lambda loss: torch.zeros((), requires_grad=True),
}


class Returning(Automatic):
    """Makes something of the loss that no step would follow."""

    made: Callable[[Tensor], Any] = staticmethod(lambda loss: loss)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        """Returns it, or hands it to `manual_backward`."""
        losses = losses_of(self.net, batch)
        loss = self.made(self.unlearn(losses, self.method, forget=batch["forget"].bool()))
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss["loss"] if isinstance(loss, dict) else loss)
        return None


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("name", MADE)
def test_a_loss_made_from_what_unlearn_returned_is_refused(name: str, automatic: bool) -> None:
    module = Returning(mtu.OrthoGrad(0.5))
    module.made, module.automatic_optimization = MADE[name], automatic
    start = weights(module.net)
    with pytest.raises(
        ValueError, match=r"lightning: found a loss .* expected what self.unlearn r"
    ):
        fit(module, 8, accumulate_grad_batches=2 if automatic else 1)
    assert torch.equal(weights(module.net), start) and module.update is None
    # as it is, in a dictionary too
    module.made = (lambda loss: {"loss": loss, "other": 1}) if automatic else Returning.made
    fit(module)
    assert module.update is not None


def test_what_is_added_to_the_loss_is_refused() -> None:
    module = Automatic(mtu.OrthoGrad(0.5))
    module.penalty = 0.1
    with pytest.raises(ValueError, match=r"found a loss made by AddBackward0, .* nothing added"):
        fit(module)


class Plain(Manual):
    """The backward of a loop without a trainer."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One step."""
        self.unlearn(losses_of(self.net, batch), self.method).backward()
        self.optimizers().step()


class OwnBackward(Automatic):
    """Overrides what the mixin does, as one does to retain graphs."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Without `super()`."""
        loss.backward()


@pytest.mark.parametrize("kind", [Plain, OwnBackward])
def test_a_backward_that_is_not_the_engines_is_refused(kind: type[Any]) -> None:
    """It would end at the returned number, so that nothing trains, and nobody is told."""
    module = kind(mtu.OrthoGrad(0.5))
    start = weights(module.net)
    with pytest.raises(RuntimeError, match=r"found autograd's backward of what self\.unlearn"):
        fit(module)
    assert torch.equal(weights(module.net), start)


def test_bases_in_the_other_order_are_refused() -> None:
    with pytest.raises(TypeError, match=r"class Behind\(Unlearning, LightningModule\)"):

        class Behind(lightning.LightningModule, Unlearning):
            """Whose `backward` would be Lightning's."""


class Twice(Automatic):
    """Two calls in one batch, one loss."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Their sum, of which the first would be lost."""
        losses, forget = losses_of(self.net, batch), batch["forget"].bool()
        left = self.unlearn(losses[forget], self.method, forget=True)
        return left + 0.3 * self.unlearn(losses[~forget], self.method)


def test_a_second_call_before_the_backward_of_the_first_is_refused() -> None:
    module = Twice(mtu.OrthoGrad(0.5))
    with pytest.raises(ValueError, match=r"found a second call in batch 0 .* whose 6 losses"):
        fit(module)
    assert module.update is None
    assert module._micro is None  # what comes next is a first call


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_batch_that_is_left_out_after_its_call() -> None:
    module = Leaving(mtu.OrthoGrad(0.5))
    module.left_out = frozenset({1})
    fit(module, 4)
    assert module.update is not None and len(module.update.roles) == 4


class Before(Leaving):
    """Leaves batches out before their call."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        """One micro-batch."""
        return None if index in self.left_out else super().training_step(batch, index)


def steps_of(windows: list[list[int]], method: mtu.Method) -> Tensor:
    """How far the plain loop moves in a step for each of these lists of micro-batches of 4."""
    net = build()
    start, engine = weights(net), mtu.Engine(net)
    optimizer, data = torch.optim.SGD(net.parameters(), lr=RATE), [*batches(Texts(), 4)]
    for window in windows:
        for i in window:
            forget = data[i]["forget"].bool()
            last = i == window[-1]
            engine.accumulate(losses_of(net, data[i]), method, forget=forget, sync=last)
        optimizer.step()
        optimizer.zero_grad()
    return moved(net, start)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("kind", [Leaving, Before])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_after_a_batch_left_out_is_that_of_the_others(
    name: str, kind: type[Leaving]
) -> None:
    """The first, the last, and all of a step."""
    for left_out, windows in (({0}, [[1], [2, 3]]), ({1}, [[0], [2, 3]]), ({1, 2, 3}, [[0]])):
        module = kind(METHODS[name]())
        module.left_out = frozenset(left_out)
        found, _ = fit(module, 4, accumulate_grad_batches=2)
        assert relative_error(found, steps_of(windows, METHODS[name]())) <= 1e-6
        assert module.engine.accumulated_bytes == 0


def test_a_step_after_a_batch_with_an_ordinary_loss_has_the_rows_too() -> None:
    """One half by `unlearn`, the other in the ordinary way, whichever comes first."""

    class Mixed(Automatic):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
            if index == self.plain:
                return losses_of(self.net, batch).mean()
            return super().training_step(batch, index)

    for plain in (0, 1):
        module, net, data = Mixed(mtu.OrthoGrad(0.5)), build(), [*batches(Texts(), 8)]
        module.plain = plain
        found, _ = fit(module, 8, accumulate_grad_batches=2)
        start, rows = weights(net), data[1 - plain]
        (losses_of(net, data[plain]).mean() / 2).backward()
        mask = rows["forget"].bool()
        mtu.Engine(net).backward(losses_of(net, rows), mtu.OrthoGrad(0.5), forget=mask)
        torch.optim.SGD(net.parameters(), lr=RATE).step()
        assert relative_error(found, moved(net, start)) <= 1e-6


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_step_after_a_batch_left_out_under_a_scaler() -> None:
    """No backward followed, so that the plugin leaves the step out; none of its rows are in the next one's."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    plugin = lightning.pytorch.plugins.MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = scaler
    module = Leaving(mtu.OrthoGrad(0.5))
    module.left_out = frozenset({1})
    found, _ = fit(module, 4, accumulate_grad_batches=2, plugins=[plugin])
    with torch.autocast("cpu", torch.bfloat16):
        expected = steps_of([[2, 3]], mtu.OrthoGrad(0.5))
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_rows_that_a_step_did_not_take_are_told() -> None:
    """An `optimizer_step` of the module's own need not call the one that takes them."""

    class Own(Leaving):
        def optimizer_step(self, *given: Any) -> None:
            _, _, optimizer, closure = given
            optimizer.step(closure=closure)

    module = Own(mtu.OrthoGrad(0.5))
    module.left_out = frozenset({1})
    with pytest.raises(RuntimeError, match="found rows held for step 0, which was taken without"):
        fit(module, 4, accumulate_grad_batches=2)
    assert module.engine.accumulated_bytes == 0


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_an_interrupted_run_are_none_of_the_next(name: str) -> None:
    """One micro-batch is held, the next waits for its backward, and the user calls fit again."""
    module = Leaving(METHODS[name]())
    module.stops_at = 1
    with pytest.raises(InterruptedError):
        fit(module, 4, accumulate_grad_batches=4)
    assert module.engine.accumulated_bytes > 0
    module.stops_at = None
    found, _ = fit(module, 4, accumulate_grad_batches=4)
    assert relative_error(found, plain_step(build(), METHODS[name]())) <= 1e-6


def test_evaluation_lets_nothing_go() -> None:
    module = Leaving(mtu.OrthoGrad(0.5))
    module.stops_at = 1
    with pytest.raises(InterruptedError):
        fit(module, 4, accumulate_grad_batches=4)
    held = module.engine.accumulated_bytes
    module.validation_step = lambda batch: None
    trainer = lightning.Trainer(accelerator="cpu", **QUIET)
    trainer.validate(module, torch.utils.data.DataLoader(Texts(), batch_size=4), verbose=False)
    assert module.engine.accumulated_bytes == held > 0


def test_an_ordinary_loss_goes_the_ordinary_way() -> None:
    class Plain(Automatic):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return losses_of(self.net, batch).mean()

    found, _ = fit(Plain(mtu.Mean()))
    assert relative_error(found, plain_step(build(), mtu.Mean())) <= 1e-6


class Never(Manual):
    """Every micro-batch is held, and the optimizer steps all the same."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One micro-batch."""
        losses, forget = losses_of(self.net, batch), batch["forget"].bool()
        self.manual_backward(self.unlearn(losses, self.method, forget=forget, sync=False))
        self.optimizers().step()


def test_a_step_by_hand_without_the_rows_is_told() -> None:
    with pytest.warns(
        UserWarning, match="found an optimizer step since rows were held by sync=Fal"
    ):
        found, _ = fit(Never(mtu.OrthoGrad(0.5)), 8)
    assert float(found.norm()) == 0.0
