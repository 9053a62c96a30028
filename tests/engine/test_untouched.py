"""Taking rows leaves model, losses and random state as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.small import MASK, build
from tests.helpers.checks import (
    random_weights,
)


def state_of(model: nn.Module) -> list[tuple[str, Any]]:
    """All that hangs on a model: attributes, hooks, buffers, gradients, hooks on parameters."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found.append((
                f"{name}.{key}",
                copy.copy(value) if isinstance(value, dict | set | list) else value,
            ))
        found += [
            (f"{name}.{key}", (b.clone(), b._version))
            for key, b in module.named_buffers(recurse=False)
        ]
    for name, p in model.named_parameters():
        keys = sorted(vars(p)) if hasattr(p, "__dict__") else []
        found.append((name, (p.detach().clone(), p._version, p.grad, p._backward_hooks, keys)))
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a is b or a == b)


UNTOUCHED = [
    "mlp",
    "batch_norm_train",
    "batch_norm_eval",
    "dropout",
    "encoder_batch_first",
    "checkpointed_dropout",
]
UNTOUCHED += ["weight_norm", "spectral_norm", "gru", "custom_function"]


@pytest.mark.parametrize("name", UNTOUCHED)
def test_rows_leave_the_model_as_it_is(name: str) -> None:
    model, forward, params, engine = build(name)
    losses = forward()
    before, random = state_of(model), torch.get_rng_state()
    hooks = (
        torch.nn.modules.module._global_forward_hooks,
        torch.nn.modules.module._global_backward_hooks,
    )
    rows = engine.rows(losses, forget=MASK)
    rows.gram()
    rows.vjp(random_weights(len(rows)))
    for (key, old), (now, new) in zip(before, state_of(model), strict=True):
        assert key == now and same(old, new), key
    assert torch.equal(random, torch.get_rng_state())
    assert not any(hooks)


def test_grad_mode_and_the_losses_are_left_alone() -> None:
    _, forward, _, engine = build()
    losses = forward()
    values = {task: loss.detach().clone() for task, loss in losses.items()}
    with torch.no_grad():
        rows = engine.rows(losses)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert not rows.gram().requires_grad
    assert all(torch.equal(losses[task].detach(), values[task]) for task in losses)
    assert not any(g.requires_grad for g in rows.vjp(random_weights(len(rows))).values())
