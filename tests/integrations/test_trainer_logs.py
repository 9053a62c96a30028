"""What a `Trainer` with the mixin logs and evaluates, and what callbacks are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast.losses import causal_lm
from tests.integrations.marks import marks
from tests.integrations.small import (
    COUNT,
    Texts,
    build,
    hf,
)
from tests.integrations.trainers import Unlearner, settings, trained

pytestmark = marks()


def test_losses_are_logged_as_they_were_before_a_scaler(tmp_path: Path) -> None:
    logs = []
    for scale in (1.0, 2.0**10):
        given = settings(tmp_path, logging_steps=1)
        own = {"method": mtu.OrthoGrad(0.5), "train_dataset": Texts()}
        trainer = Unlearner(build(), given, **own)
        # as of fp16, which the Trainer has on a GPU only
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "forget_loss", "retain_loss"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-6)


def test_logging_and_evaluation(tmp_path: Path) -> None:
    own = {"eval_dataset": Texts(seed=5)}
    model = build()
    with torch.no_grad():
        items = Texts()
        logged = float(causal_lm(model(input_ids=items.tokens).logits, items.tokens).mean())
    trainer, _ = trained(
        tmp_path,
        model,
        own,
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        eval_strategy="steps",
        eval_steps=1,
    )
    history = trainer.state.log_history
    losses = [line["loss"] for line in history if "loss" in line]
    assert losses[0] == pytest.approx(logged, rel=1e-3)
    assert len([line for line in history if "eval_loss" in line]) == 2
    evaluated = trainer.evaluate()
    with torch.no_grad():
        tokens = own["eval_dataset"].tokens
        expected = model.eval()(input_ids=tokens, labels=tokens).loss
    assert evaluated["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


class Caught(hf.TrainerCallback):
    """What TensorBoard's and W&B's callbacks are given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Keep it."""
        self.logs.append(dict(logs))


def test_callbacks_are_given_both_sides(tmp_path: Path) -> None:
    model, data, caught = build(), Texts(), Caught()
    with torch.no_grad():
        losses = causal_lm(model(input_ids=data.tokens).logits, data.tokens)
    trained(tmp_path, model, {"callbacks": [caught]}, logging_steps=1)
    forget = torch.tensor([bool(data[i]["forget"]) for i in range(COUNT)])
    first = caught.logs[0]
    assert first["forget_loss"] == pytest.approx(float(losses[forget].mean()), rel=1e-5)
    assert first["retain_loss"] == pytest.approx(float(losses[~forget].mean()), rel=1e-5)
    assert "forget_loss" not in caught.logs[-1]  # that is the summary of the run


def test_tensorboard_is_given_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real callback writes a file, and its curves are the losses of both sides."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    trainer, _ = trained(tmp_path, report_to=["tensorboard"], logging_steps=1, max_steps=3)
    written = EventAccumulator(str(tmp_path / "curves"))
    written.Reload()
    logged = [line for line in trainer.state.log_history if "forget_loss" in line]
    for side in ("forget_loss", "retain_loss"):
        curve = [event.value for event in written.Scalars(f"train/{side}")]
        assert curve == pytest.approx([line[side] for line in logged], rel=1e-6)
        assert len(curve) == 3


@pytest.mark.filterwarnings("ignore")
def test_wandb_is_given_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real callback, without a network."""
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        trainer, _ = trained(tmp_path, report_to=["wandb"], logging_steps=1, max_steps=2)
        found = dict(wandb.run.summary)
    finally:
        wandb.finish()
    last = [line for line in trainer.state.log_history if "forget_loss" in line][-1]
    assert found["train/forget_loss"] == pytest.approx(last["forget_loss"], rel=1e-6)
    assert found["train/retain_loss"] == pytest.approx(last["retain_loss"], rel=1e-6)


def test_all_losses_of_a_line_are_of_the_same_steps(tmp_path: Path) -> None:
    """Means since the line before: both sides together are the `Trainer`'s own mean."""
    more: dict[str, Any] = {"logging_steps": 3, "max_steps": 7, "per_device_train_batch_size": 4}
    more |= {"train_sampling_strategy": "sequential", "learning_rate": 0.5}
    trainer, _ = trained(tmp_path, own={"train_dataset": Quarters()}, **more)
    lines = [line for line in trainer.state.log_history if "forget_loss" in line]
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        # one of each four is to be forgotten
        both = (line["forget_loss"] + 3 * line["retain_loss"]) / 4
        assert line["loss"] == pytest.approx(both, rel=1e-5)
    assert abs(lines[0]["forget_loss"] - lines[1]["forget_loss"]) > 1e-3


class Quarters(Texts):
    """One of each four is to be forgotten."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return super().__getitem__(i) | {"forget": torch.tensor(int(i % 4 == 0))}
