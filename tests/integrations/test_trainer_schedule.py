"""A method with a schedule in the `Trainer`: its epochs, and whose run they are of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mtu_fast as mtu
from mtu_fast.integrations.transformers import language_model_losses
from mtu_fast.losses import causal_lm
from tests.integrations.marks import marks
from tests.integrations.small import (
    Texts,
    build,
    weights,
)
from tests.integrations.trainers import Unlearner, settings, trained

pytestmark = marks()


TAU = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 500}


def tau_trainer(folder: Path, **more: Any) -> Any:
    """12 items to retain, 3 batches a pass; 4 to forget, one; so E = int(6 · 3 / 2) = 9 epochs of one step."""
    return Unlearner(
        build(),
        settings(folder, **(TAU | more)),
        method=mtu.NablaTau(),
        train_dataset=Texts(12, seed=2, column=False),
        forget_dataset=Texts(4, seed=3, column=False),
        eval_dataset=Texts(5, seed=4, column=False),
    )


def test_the_schedule_of_nabla_tau(tmp_path: Path) -> None:
    trainer = tau_trainer(tmp_path)
    with torch.no_grad():
        tokens = trainer.eval_dataset.tokens
        tau = float(causal_lm(trainer.model(input_ids=tokens).logits, tokens).mean())
    seen = []
    method = trainer.method
    begin = type(method).start_epoch

    def start_epoch(self: Any, epoch: int, validation: Any) -> None:
        begin(self, epoch, validation)
        seen.append((epoch, self.alpha, dict(self.tau)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "start_epoch", start_epoch)
        trainer.train()
    assert trainer.state.global_step == 9 and [epoch for epoch, _, _ in seen] == list(range(9))
    alphas = [alpha for _, alpha, _ in seen]
    assert alphas == pytest.approx([5 / 3 * 4 / 16 * (1 - epoch / 9) for epoch in range(9)])
    assert seen[0][2]["loss"] == pytest.approx(tau, rel=1e-6)
    assert seen[4][2] == seen[0][2] != seen[5][2]  # looked at again after five epochs


def test_the_schedule_is_resumed_to_the_bit(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 4}
    whole = tau_trainer(tmp_path, **saved)
    whole.train()
    resumed = tau_trainer(tmp_path, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 9
    assert torch.equal(weights(resumed.model), weights(whole.model))


def epochs_of(trainer: Any, train: Callable[[], object]) -> list[int]:
    """The epochs that begin while it trains."""
    seen: list[int] = []
    begin = mtu.NablaTau.start_epoch

    def start_epoch(self: Any, epoch: int, validation: Any) -> None:
        begin(self, epoch, validation)
        seen.append(epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mtu.NablaTau, "start_epoch", start_epoch)
        train()
    return seen


def test_a_run_that_follows_an_interrupted_one_begins_the_schedule_anew(tmp_path: Path) -> None:
    """Whatever step that one ended in: the first, or the one that a checkpoint goes on from."""
    saved = {"save_strategy": "steps", "save_steps": 4}
    whole = tau_trainer(tmp_path, **saved)
    whole.train()
    for at, more in ((0, {}), (4, {"resume_from_checkpoint": str(tmp_path / "checkpoint-4")})):
        trainer = tau_trainer(tmp_path, **saved)
        losses = trainer.losses

        def failing(model: Any, batch: Any, trainer: Any = trainer, at: int = at) -> Any:
            if model.training and trainer.state.global_step == at:
                raise InterruptedError
            return language_model_losses(model, batch)

        trainer.losses = failing
        with pytest.raises(InterruptedError):
            trainer.train()
        trainer.losses = losses
        assert epochs_of(trainer, partial(trainer.train, **more)) == list(range(at, 9))
        if more:
            assert torch.equal(weights(trainer.model), weights(whole.model))


def test_the_schedule_is_that_of_the_batch_size_that_fits(tmp_path: Path) -> None:
    trainer = tau_trainer(
        tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True, max_steps=60
    )
    losses, seen = trainer.losses, []

    def hungry(model: Any, batch: Any) -> Any:
        size = len(batch["input_ids"])
        if model.training and size > 4:  # two items to retain and two to forget fit
            raise RuntimeError("CUDA out of memory.")
        seen.append(size)
        return losses(model, batch)

    trainer.losses = hungry
    epochs = epochs_of(trainer, trainer.train)
    # 4 + 4 did not fit, nor did 3 + 3; of 2 + 2 a step holds two, so that a pass is one step
    assert epochs == [0, 0, *range(9)] and trainer.state.global_step == 9


def test_a_schedule_without_its_data_is_refused(tmp_path: Path) -> None:
    for own in ({}, {"forget_dataset": Texts(4, column=False)}):
        with pytest.raises(ValueError, match="NablaTau takes its schedule from"):
            trained(tmp_path, own={"method": mtu.NablaTau(), **own})


def test_a_schedule_without_a_validation_loss_is_refused(tmp_path: Path) -> None:
    """Its last batch is dropped, which is its only one."""
    trainer = tau_trainer(tmp_path, per_device_eval_batch_size=8, dataloader_drop_last=True)
    with pytest.raises(
        ValueError, match="eval_dataset: found no sample with a loss, expected at l"
    ):
        trainer.train()
