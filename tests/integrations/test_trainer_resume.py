"""Runs of a `Trainer` that are resumed, interrupted, or begun anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.integrations._states import STATE
from tests.helpers.truth import relative_error
from tests.integrations.marks import marks
from tests.integrations.small import (
    METHODS,
    Texts,
    build,
    losses_of,
    moved,
    plain_step,
    weights,
)
from tests.integrations.trainers import Unlearner, settings

pytestmark = marks()


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_an_interrupted_run_are_none_of_the_next(name: str, tmp_path: Path) -> None:
    """A run ends in its second micro-batch, and the user calls train again."""
    calls: list[int] = []

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(len(calls))
        if calls[-1] == 1:
            raise InterruptedError("stop")
        return losses_of(model, batch)

    size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    own = {"method": METHODS[name](), "train_dataset": Texts(), "losses": losses}
    model = build()
    trainer, start = Unlearner(model, settings(tmp_path, **size), **own), weights(model)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert trainer.engine.accumulated_bytes > 0
    trainer.train()
    assert relative_error(moved(model, start), plain_step(build(), METHODS[name]())) <= 1e-6


@dataclass(frozen=True)
class Kept(mtu.InterferenceAware):
    """A method with a state and random numbers of its own: how often it was asked."""

    asked: list[int] = field(default_factory=lambda: [0], compare=False)
    noise: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def __call__(self, G: Any, roles: Any) -> Tensor:
        self.asked[0] += 1
        factor = self.asked[0] + float(torch.rand((), generator=self.noise))
        return super().__call__(G, roles) * factor

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"asked": self.asked[0]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.asked[0] = state["asked"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resume_to_the_bit(dropout: float, tmp_path: Path) -> None:
    """Four steps at once, and two and two: model, optimizer, random numbers, subspace and method."""
    more = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    found = []
    for resume in (False, True):
        model = build(attention_dropout=dropout)
        method = Kept(0.3)
        trainer = Unlearner(
            model,
            settings(tmp_path, **more),
            method=method,
            subspace=mtu.Subspace(12, every=1),
            train_dataset=Texts(),
        )
        if resume:
            assert (tmp_path / "checkpoint-2" / STATE).is_file()
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        else:
            trainer.train()
        assert trainer.subspace is not None and trainer.subspace.full
        assert method.asked == [4]
        found.append(weights(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["orthograd", "a subspace"])
def test_a_model_made_anew_begins_anew(name: str, tmp_path: Path) -> None:
    """With `model_init=` each call of train makes a model: rows kept of the one before are none of its own."""
    own: dict[str, Any] = {"model_init": lambda: build(), "train_dataset": Texts()}
    own["method"] = METHODS[name]() if name in METHODS else mtu.InterferenceAware(0.3)
    own["subspace"] = None if name in METHODS else mtu.Subspace(6, every=1)
    size = {"per_device_train_batch_size": 4, "max_steps": 3}
    trainer = Unlearner(None, settings(tmp_path, **size), **own)
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    assert torch.equal(weights(trainer.model), first)
