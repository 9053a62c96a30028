"""Relearning counts plain steps on a copy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtu_fast.unlearning.metrics import relearn_steps

RATE = 0.25  # with loss (w - 1)² / 2 the distance of w from 1 is multiplied by 1 - RATE each step


def model(start: float) -> nn.Linear:
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(start)
    return net


def losses(net: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    return {"a": (net(batch) - 1).square().flatten() / 2}


def score(net: nn.Module) -> float:
    return -abs(1 - float(net.weight.detach()))


def steps(net: nn.Module, level: float, **options: Any) -> int | None:
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=RATE)  # noqa: E731
    return relearn_steps(
        net, [torch.ones(2, 1), torch.ones(3, 1)], losses, score, level, sgd, **options
    )


def test_the_number_of_steps_is_that_of_the_closed_form() -> None:
    """0.75^s ≤ 0.1 from s = 9 on."""
    assert 0.75**9 < 0.1 < 0.75**8
    assert steps(model(0.0), level=-0.1) == 9
    assert steps(model(0.0), level=-0.1, every=4) == 12


def test_at_the_level_already_takes_no_step() -> None:
    assert steps(model(1.0), level=0.0) == 0


def test_out_of_reach_is_none_and_the_last_step_counts() -> None:
    assert steps(model(0.0), level=-0.1, limit=8) is None
    assert steps(model(0.0), level=-0.1, limit=9) == 9
    assert steps(model(0.0), level=-0.1, limit=9, every=5) == 9


def test_the_model_is_not_touched_and_a_frozen_one_serves() -> None:
    net = model(0.0).requires_grad_(False)
    assert steps(net, level=-0.1) == 9
    assert float(net.weight) == 0.0 and net.weight.grad is None and not net.weight.requires_grad


def test_samples_without_a_label_have_no_say() -> None:
    """Half of the samples pull to -1, without a label; a batch without any makes a step that goes nowhere."""
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=RATE)  # noqa: E731
    batch, there = torch.ones(4, 1), torch.tensor([True, False, True, False])
    goals = torch.where(there, 1.0, -1.0)

    def masked(net: nn.Module, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (net(batch).flatten() - goals).square() / 2, {"loss": mask}

    assert relearn_steps(model(0.0), [there], masked, score, -0.1, sgd) == 9
    assert (
        relearn_steps(model(0.0), [there, torch.zeros_like(there)], masked, score, -0.1, sgd) == 17
    )


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="limit: found 0"):
        steps(model(0.0), level=0.0, limit=0)
    with pytest.raises(ValueError, match="level: found nan"):
        steps(model(0.0), level=math.nan)
    with pytest.raises(ValueError, match="score after 0 steps: found nan"):
        steps(model(math.nan), level=0.0)
    nothing: list[Tensor] = []
    with pytest.raises(ValueError, match="no batch"):
        relearn_steps(
            model(0.0), nothing, losses, score, 0.0, lambda p: torch.optim.SGD(p, lr=RATE)
        )
