"""The mixin in real `lightning` trainers: automatic and manual optimization, accumulation, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mtu_fast as mtu
from tests.helpers.truth import relative_error
from tests.integrations.lightnings import (
    MARKS,
    Automatic,
    Manual,
    fit,
    lightning,
    losses_by_side,
)
from tests.integrations.small import (
    METHODS,
    build,
    checkpointed,
    plain_step,
)

pytestmark = MARKS


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("name", METHODS)
def test_automatic(name: str, size: int) -> None:
    module = Automatic(METHODS[name]())
    found, _ = fit(module, size, accumulate_grad_batches=16 // size)
    assert relative_error(found, plain_step(build(), METHODS[name]())) <= 1e-6
    assert module.update is not None and module.engine.accumulated_bytes == 0


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("name", METHODS)
def test_manual(name: str, size: int) -> None:
    found, _ = fit(Manual(METHODS[name]()), size)
    assert relative_error(found, plain_step(build(), METHODS[name]())) <= 1e-6


def test_an_epoch_that_ends_within_a_step() -> None:
    """16 samples by 4, a step each 3 micro-batches: 12 and 4."""
    module = Automatic(mtu.OrthoGrad(0.5))
    _, trainer = fit(module, 4, accumulate_grad_batches=3, max_epochs=2)
    assert trainer.global_step == 4 and len(module.update.roles) == 4


def test_bf16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_step(build(), mtu.OrthoGrad(0.5))
    found, _ = fit(Automatic(mtu.OrthoGrad(0.5)), precision="bf16-mixed")
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("size", [16, 4])
def test_gradient_checkpointing(size: int) -> None:
    module = Automatic(mtu.OrthoGrad(0.5))
    checkpointed(module.net)
    found, _ = fit(module, size, accumulate_grad_batches=16 // size)
    assert module.net.is_gradient_checkpointing
    assert relative_error(found, plain_step(build(), mtu.OrthoGrad(0.5))) <= 1e-6


def test_a_scaler() -> None:
    """The plugin's for float16, on the CPU: what it multiplies it divides again."""
    plugin = lightning.pytorch.plugins.MixedPrecision(
        "16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12)
    )
    with torch.autocast("cpu", torch.float16):
        expected = plain_step(build(), mtu.OrthoGrad(0.5))
    module = Automatic(mtu.OrthoGrad(0.5))
    losses, forget = losses_by_side(module.net)
    found, _ = fit(module, plugins=[plugin])
    assert relative_error(found, expected) <= 1e-2  # float16 rounds scaled gradients elsewhere
    # what is logged is not scaled
    means = {"forget_loss": float(losses[forget].mean())}
    means["retain_loss"] = float(losses[~forget].mean())
    assert module.sides == pytest.approx(means, rel=1e-2)
    with pytest.raises(ValueError, match="NashMTL: found a loss scaler"):
        fit(Automatic(mtu.NashMTL()), plugins=[plugin])


def test_clipping() -> None:
    expected = plain_step(build(), mtu.OrthoGrad(0.5), clip=1e-2)
    found, _ = fit(Automatic(mtu.OrthoGrad(0.5)), gradient_clip_val=1e-2)
    assert relative_error(found, expected) <= 1e-5


def test_both_sides_are_logged() -> None:
    class Logged(Automatic):
        def on_train_batch_end(self, *_: Any) -> None:
            self.log_dict(self.sides)

    module = Logged(mtu.OrthoGrad(0.5))
    assert module.sides == {}
    losses, forget = losses_by_side(module.net)
    _, trainer = fit(module)
    logged = trainer.callback_metrics
    assert float(logged["forget_loss"]) == pytest.approx(float(losses[forget].mean()), rel=1e-5)
    assert float(logged["retain_loss"]) == pytest.approx(float(losses[~forget].mean()), rel=1e-5)


def test_some_parameters() -> None:
    class Some(Automatic):
        def shared_parameters(self) -> Any:
            return self.net.model.layers.parameters()

    module = Some(mtu.OrthoGrad(0.5))
    fit(module)
    assert all("layers" in name for name in module.engine.parameters)
