"""A `Trainer` with the mixin and its settings, as users write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.integrations.transformers import Unlearning
from tests.integrations.small import (
    COUNT,
    RATE,
    Texts,
    build,
    hf,
    moved,
    weights,
)

pytest.importorskip("accelerate")


class Unlearner(Unlearning, hf.Trainer):
    """What a user writes."""


def settings(folder: Path, **more: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": COUNT,
        "max_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return hf.TrainingArguments(**(given | more))


def trained(
    folder: Path, model: nn.Module | None = None, own: dict[str, Any] | None = None, **more: Any
) -> tuple[Any, Tensor]:
    """A trainer that ran, and how far its model moved."""
    model = build() if model is None else model
    start = weights(model)
    arguments: dict[str, Any] = {"method": mtu.OrthoGrad(0.5), "train_dataset": Texts()}
    trainer = Unlearner(model, settings(folder, **more), **(arguments | (own or {})))
    trainer.train()
    return trainer, moved(model, start)
