"""Steps that fail, steps that go on from a state, micro-batches, and what a memory refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.checks import clear, grad_vector, trained, truth_of
from tests.helpers.truth import matrix, relative_error
from tests.kept.memory import ALPHA, RETAINED, backward
from tests.kept.scene import MASK, PARTIAL, N, Refuses, batch, broken, build, move


class Scaled(nn.Module):
    """A layer and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = (torch.tanh(self.layer(x)) * self.scale).square().sum(1)
        return loss


@pytest.mark.parametrize("silent", [False, True])
def test_a_basis_of_numbers_and_of_rows_of_zeros(silent: bool) -> None:
    """A parameter of no dimensions is a part of the basis; rows of zeros span nothing."""
    torch.manual_seed(0)
    net = Scaled().double()
    engine, memory, params = mtu.Engine(net), mtu.Memory(every=1, basis=True), trained(net)
    mask, kept = torch.arange(N) < 3, torch.zeros(0, 25, dtype=torch.float64)
    for seed in range(4):
        loss = net(batch(seed))
        if silent:
            loss = torch.where(mask, loss, 0 * loss)
        J = matrix(truth_of({"loss": loss}, params))
        clear(params)
        engine.backward(loss, mtu.OrthoGrad(0.0), forget=mask, memory=memory)
        assert memory.held.rows is not None
        basis = matrix(dict(enumerate(memory.held.rows.jacobian().values())))
        fixed = torch.cat([J[~mask], kept])
        Q = torch.linalg.svd(fixed, full_matrices=False)
        Q = Q.Vh[Q.S > 1e-9]
        f = J[mask].mean(0)
        assert relative_error(grad_vector(params), f @ Q.T @ Q - f) <= 1e-9
        kept = basis
        with torch.no_grad():
            for p in params:
                p.mul_(1.001)


def test_a_step_that_fails_keeps_nothing() -> None:
    net, engine = build()
    memory = mtu.Memory(every=1)
    backward(net, engine, memory, 0)
    held = memory.held
    clear(list(net.parameters()))
    with pytest.raises(RuntimeError, match=r"to forget \[\('a', 2\)\] is not finite"):
        engine.backward(broken(net, 5), mtu.OrthoGrad(0.3), forget=PARTIAL, memory=memory)
    refuses = Refuses(0.3)
    subspace = mtu.Subspace()
    with pytest.raises(ArithmeticError, match="not today"):
        engine.backward(
            net.losses(batch(5)), refuses, forget=PARTIAL, subspace=subspace, memory=memory
        )
    assert memory.held is held and subspace.size is None
    assert all(p.grad is None for p in net.parameters())
    backward(net, engine, memory, 6)
    assert len(memory) == 2 * RETAINED


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": "conflicting"}, {"basis": True}, {"dtype": torch.bfloat16}, {"budget": 60_000}],
    ids=str,
)
def test_one_that_loads_the_state_goes_on_alike(options: dict[str, Any], tmp_path: Path) -> None:
    """To the bit, through a file."""
    found = []
    for reload in (False, True):
        net, engine = build()
        memory = mtu.Memory(**options)
        for seed in range(9):
            if seed == 5:
                torch.save(memory.state_dict(), tmp_path / "state.pt")
            if seed == 5 and reload:
                memory = mtu.Memory(**options)
                state = torch.load(tmp_path / "state.pt", weights_only=True)
                memory.load_state_dict(state, engine.subspace_rows)
            backward(net, engine, memory, seed)
            move(net)
        found.append(grad_vector(list(net.parameters())))
    assert torch.equal(*found)


def test_micro_batches_are_one_step() -> None:
    found = []
    for parts in (1, 2):
        net, engine = build()
        memory = mtu.Memory()
        for seed in range(3):
            clear(list(net.parameters()))
            for i, x in enumerate(batch(seed).chunk(parts)):
                kinds = {"a": MASK.chunk(parts)[i]}
                engine.accumulate(
                    net.losses(x), mtu.OrthoGrad(ALPHA), forget=kinds, sync=i + 1 == parts,
                    memory=memory,
                )  # fmt: skip
            move(net)
        found.append(grad_vector(list(net.parameters())))
    assert relative_error(found[1], found[0]) <= 1e-9


def test_rows_of_two_loaders() -> None:
    found = []
    for twice in (False, True):
        net, engine = build()
        memory = mtu.Memory()
        for seed in range(3):
            clear(list(net.parameters()))
            x, gone = batch(seed), {"a": MASK}
            if twice:
                first = engine.rows(net.losses(x[:2]), forget={"a": MASK[:2]})
                rows = mtu.cat(first, engine.rows(net.losses(x[2:]), forget={"a": MASK[2:]}))
            else:
                rows = engine.rows(net.losses(x), forget=gone)
            memory.step(rows, mtu.OrthoGrad(ALPHA))
            with pytest.raises(RuntimeError, match="used these rows up"):
                rows.gram()
        found.append(grad_vector(list(net.parameters())))
    assert relative_error(found[1], found[0]) <= 1e-9


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"size": 0}, ValueError, "Memory: size: found 0"),
        ({"every": 1.5}, TypeError, "Memory: every: found 1.5"),
        ({"tasks": "seg"}, TypeError, "expected several names"),
        ({"keep": "oldest"}, ValueError, "keep: found 'oldest', expected one of"),
        ({"per_task": 1}, TypeError, "per_task: found 1, expected True or False"),
        ({"budget": 0}, ValueError, "budget: found 0"),
        ({"energy": 0.5}, ValueError, "basis=True"),
        ({"dtype": torch.int32}, TypeError, "dtype: found torch.int32"),
        ({"basis": True, "keep": "conflicting"}, ValueError, "keep='conflicting' with basis=True"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        mtu.Memory(**options)


def test_misuse_is_named() -> None:
    net, engine = build()
    losses = net.losses(batch(0))
    with pytest.raises(ValueError, match=r"LevelledOrthoGrad moves across .* mtu.Memory\(\)"):
        engine.backward(losses, mtu.LevelledOrthoGrad(), forget=PARTIAL)
    with pytest.raises(ValueError, match="GradDiff does not use one"):
        engine.backward(losses, mtu.GradDiff(), forget=PARTIAL, memory=mtu.Memory())
    with pytest.raises(TypeError, match=r"memory: found int, expected an mtu\.Memory"):
        engine.backward(losses, mtu.OrthoGrad(), forget=PARTIAL, memory=3)
    assert all(p.grad is None for p in net.parameters())
