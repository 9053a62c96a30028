"""A loop as Accelerate's documentation has it, with the engine in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.integrations import accelerate as ours
from tests.integrations.small import (
    COUNT,
    RATE,
    Texts,
    build,
    checkpointed,
    losses_of,
    moved,
    weights,
)

pytest.importorskip("accelerate")

import accelerate


def run(
    method: mtu.Method,
    size: int = COUNT,
    scaler: Any = None,
    epochs: int = 1,
    checkpointing: bool = False,
    **more: Any,
) -> tuple[Tensor, list[mtu.Update | None], nn.Module]:
    """A loop as Accelerate's documentation has it; how far the model moved."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=COUNT // size, **more
    )
    if scaler is not None:
        accelerator.scaler = scaler
    model = build()
    if checkpointing:
        checkpointed(model)
    start, found = weights(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = torch.utils.data.DataLoader(Texts(), batch_size=size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if scaler is not None:
        optimizer.scaler = scaler
    engine = mtu.Engine(model)
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                losses = losses_of(model, batch)
                forget = batch["forget"].bool()
                found.append(ours.backward(accelerator, engine, losses, method, forget=forget))
                optimizer.step()
                optimizer.zero_grad()
    return moved(model, start), found, model
