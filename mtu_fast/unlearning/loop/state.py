"""What a step changes: model, optimizer, scheduler, method, generators; taken as copies, and put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtu_fast._rows.inner import inner
from mtu_fast.unlearning.loaders import generators_of
from mtu_fast.unlearning.loop.copies import copied
from mtu_fast.unlearning.loop.settings import Settings


def take(settings: Settings, *, strict: bool) -> dict[str, Any]:
    """{part: its state}, and where the generators of the method and of the user's functions stand.

    Args:
        settings: the run's.
        strict: whether to refuse what cannot be read back from a file safely.
    """
    state = {}
    for name, part in _parts(settings).items():
        state[name] = copied(part.state_dict(), name, strict=strict)
    state["draws"] = [draw.get_state() for draw in _drawn(settings)]
    return state


def mark(settings: Settings) -> dict[str, Any]:
    """What `take` takes, and what subspace, memory and levels hold, to come back to in this process."""
    held = {name: part.held for name, part in kept_parts(settings).items()}
    return take(settings, strict=False) | {"held": held}


def put_back(settings: Settings, state: Mapping[str, Any]) -> None:
    """Give every part the state that `take` or `mark` took; the state itself stays what it is."""
    for name, part in _parts(settings).items():
        if name in state:
            # optimizers keep the tensors they are given, and the next step would change them
            part.load_state_dict(copied(state[name], name, strict=False))
    for draw, stands in zip(_drawn(settings), state["draws"], strict=True):
        draw.set_state(stands)
    for name, held in state.get("held", {}).items():
        kept_parts(settings)[name].held = held


def cut_as(settings: Settings) -> Callable[[tuple[Any, ...]], Tensor]:
    """What a tensor is cut as, by the keys that lead to it in `take`: the model's, or the optimizer's parameter."""
    model = inner(settings.model).state_dict()
    parameters = [p for group in settings.optimizer.param_groups for p in group["params"]]

    def like(at: tuple[Any, ...]) -> Tensor:
        if at[0] != "model" and at[2] >= len(parameters):
            raise LookupError(
                f"found a state of parameter {at[2]}, expected one of the optimizer's {len(parameters)}."
            )
        found: Tensor = model[at[1]] if at[0] == "model" else parameters[at[2]]
        return found

    return like


def _parts(settings: Settings) -> dict[str, Any]:
    """{name: what has a state of its own}, of those that this run has; the model as it is in no wrapper."""
    parts = {name: getattr(settings, name) for name in ("optimizer", "scheduler", "method")}
    parts = {"model": inner(settings.model), **parts}
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


def kept_parts(settings: Settings) -> dict[str, Any]:
    """{name: what holds values of earlier steps in `held`}, of those that this run has."""
    parts = {name: getattr(settings, name) for name in ("subspace", "memory", "levels")}
    return {name: part for name, part in parts.items() if part is not None}


def _drawn(settings: Settings) -> list[torch.Generator]:
    return [*settings.method.generators(), *settings.generators]


def drawn_from(settings: Settings) -> list[torch.Generator]:
    """The generators that loaders and the user's functions draw from, each once; a step may move any."""
    found = [*generators_of(settings.forget, settings.retain), *settings.generators]
    return list({id(generator): generator for generator in found}.values())


def clear_gradients(settings: Settings) -> None:
    """Remove every `.grad`, also of parameters outside the optimizer."""
    settings.model.zero_grad(set_to_none=True)
    settings.optimizer.zero_grad(set_to_none=True)
