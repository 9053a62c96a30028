"""Which retain rows stay: a budget, a number of each task, the ones that forgetting harms most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from tests.helpers.checks import grad_vector, trained, truth_of
from tests.helpers.truth import matrix, relative_error
from tests.kept.memory import RETAINED, backward
from tests.kept.scene import N, batch, build, move


def test_a_budget_is_kept() -> None:
    net, engine = build()
    P = sum(p.numel() for p in net.backbone.parameters())
    memory = mtu.Memory(budget=8 * P * (RETAINED + 4))
    for seed in range(6):
        backward(net, engine, memory, seed)
        assert len(memory) <= RETAINED + 4
    assert len(memory) == memory.size == RETAINED + 4
    for size in (None, 4):
        with pytest.raises(ValueError, match="budget is 5 bytes, expected at least"):
            backward(net, engine, mtu.Memory(size, budget=5), 0)
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("per_task", [True, False])
def test_a_budget_bounds_the_size_that_is_asked_for(size: int, per_task: bool) -> None:
    net, engine = build()
    P = sum(p.numel() for p in net.backbone.parameters())
    for rows in (1, 4):
        memory = mtu.Memory(size, budget=8 * P * rows + 7, every=1, per_task=per_task)
        for seed in range(3):
            backward(net, engine, memory, seed)
            assert memory.size == min(size, rows)
            assert memory.size - per_task <= len(memory) <= memory.size


def test_as_many_of_each_task() -> None:
    net, engine = build()
    memory = mtu.Memory(size=10, per_task=True)
    for seed in range(4):
        backward(net, engine, memory, seed)
    block = memory.held.block
    assert block is not None
    assert block.roles.task.bincount().tolist() == [5, 5]


def test_only_some_tasks() -> None:
    net, engine = build()
    memory = mtu.Memory(tasks=("b",))
    backward(net, engine, memory, 0)
    assert len(memory) == N and memory.size == 4 * N
    with pytest.raises(ValueError, match=r"tasks names \['c'\], the rows have \['a', 'b'\]"):
        backward(net, engine, mtu.Memory(tasks=("c",)), 1)


def test_rows_that_forgetting_harms_most_stay() -> None:
    net, engine = build()
    memory = mtu.Memory(size=6, keep="conflicting", every=1)
    for seed in range(3):
        held = memory.held.rows
        losses = net.losses(batch(seed))
        J = matrix(truth_of(losses, trained(net.backbone)))
        backward(net, engine, memory, seed)
        new = torch.cat([J[3:N], J[N:]])
        every = new if held is None else torch.cat([explicit(held), new])
        harm = (every @ J[:3].mean(0)) / every.norm(dim=1)
        best = harm.topk(6).indices.sort().values
        kept = memory.held.rows
        assert kept is not None and relative_error(explicit(kept), every[best]) <= 1e-12


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"basis": True}, {"basis": True, "energy": 0.9}], ids=str
)
def test_other_forms(options: dict[str, Any]) -> None:
    """The step's rows are exact constraints whatever stands for those before; what is held is a constraint too."""
    net, engine = build(torch.float32)
    memory = mtu.Memory(size=RETAINED, **options)
    for seed in range(4):
        backward(net, engine, memory, seed, mtu.OrthoGrad(0.0))
    kept, params = memory.held.rows, trained(net.backbone)
    assert kept is not None and 0 < len(kept) <= RETAINED
    update = backward(net, engine, memory, 9, mtu.OrthoGrad(0.0))
    assert int((update.roles.kind == mtu.MEMORY).sum()) == len(kept)
    J = matrix(truth_of(net.losses(batch(9, torch.float32)), params))
    d = grad_vector(params)
    for rows, limit in ((torch.cat([J[3:N], J[N:]]), 1e-5), (explicit(kept), 1e-3)):
        assert ((rows @ d).abs() <= limit * rows.norm(dim=1) * d.norm()).all()


def explicit(rows: mtu.Rows) -> Tensor:
    return torch.cat([part.flatten(1) for part in rows.jacobian().values()], 1).double()


@pytest.mark.parametrize("seed", range(3))
def test_float32_rows_are_protected_as_without_a_memory(seed: int) -> None:
    net, engine = build(torch.float32)
    memory, params = mtu.Memory(), trained(net.backbone)
    for before in range(6):
        backward(net, engine, memory, 10 * seed + before, mtu.OrthoGrad(0.0))
        move(net)
    J = matrix(truth_of(net.losses(batch(seed, torch.float32)), params))
    backward(net, engine, memory, seed, mtu.OrthoGrad(0.0))
    rows, d = torch.cat([J[3:N], J[N:]]), grad_vector(params)
    assert ((rows @ d).abs() <= 1e-5 * rows.norm(dim=1) * d.norm()).all()
