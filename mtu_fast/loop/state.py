"""What a step changes: model, optimizer, scheduler, method; taken as copies, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtu_fast.loop.checkpoint import copied
from mtu_fast.loop.settings import Settings

PARTS = ("model", "optimizer", "scheduler", "method")


def take(settings: Settings, *, strict: bool) -> dict[str, Any]:
    """{part: its state}, and where the method's own generator stands.

    Args:
        settings: the run's.
        strict: whether to refuse what cannot be read back from a file safely.
    """
    parts = {name: getattr(settings, name) for name in PARTS}
    state = {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}
    draws = getattr(settings.method, "generator", None)
    state["draws"] = draws.get_state() if isinstance(draws, torch.Generator) else None
    return {name: copied(part, name, strict=strict) for name, part in state.items()}


def put_back(settings: Settings, state: Mapping[str, Any]) -> None:
    """Give every part the state that `take` took; the state itself stays what it is."""
    for name in PARTS:
        if name in state:
            getattr(settings, name).load_state_dict(copied(state[name], name, strict=False))
    draws = getattr(settings.method, "generator", None)
    if isinstance(draws, torch.Generator) and isinstance(state["draws"], Tensor):
        draws.set_state(state["draws"])


def clear_gradients(settings: Settings) -> None:
    """No `.grad` anywhere, of parameters outside the optimizer neither."""
    settings.model.zero_grad(set_to_none=True)
    settings.optimizer.zero_grad(set_to_none=True)
