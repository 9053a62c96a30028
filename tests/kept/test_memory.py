"""Retain rows kept across steps: that a step with them is the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast import reference
from tests.helpers.checks import clear, grad_vector, trained, truth_of
from tests.helpers.truth import matrix, relative_error
from tests.kept.memory import ALPHA, RETAINED, backward
from tests.kept.scene import MASK, PARTIAL, N, batch, build, move


@pytest.mark.parametrize("forget", [MASK, PARTIAL], ids=["full", "partial"])
@pytest.mark.parametrize("per", ["global", "layer"])
def test_steps_are_the_references(forget: Any, per: Any) -> None:
    """Seven steps, parameters moving: the rows of every second one are kept, and the oldest go."""
    net, engine = build()
    params, heads = trained(net.backbone), trained(net.heads)
    memory = mtu.Memory(size=20)
    M: Tensor | None = None
    for seed in range(7):
        clear(list(net.parameters()))
        losses = net.losses(batch(seed))
        J = matrix(truth_of(losses, params))
        blocks = [[0, 1], [2, 3]] if per == "layer" else None
        reference.backward(
            params, losses, "levelled_orthograd", forget=forget, outside=heads, blocks=blocks,
            subspace=M, alpha=ALPHA,
        )  # fmt: skip
        expected, of_heads = grad_vector(params), grad_vector(heads)
        update = backward(
            net, engine, memory, seed, mtu.LevelledOrthoGrad(ALPHA, granularity=per), forget
        )
        assert relative_error(grad_vector(params), expected) <= 1e-9
        assert relative_error(grad_vector(heads), of_heads) <= 1e-12
        masks = forget if isinstance(forget, dict) else {"a": MASK, "b": MASK}
        retained = [~masks.get(task, ~torch.ones_like(MASK)) for task in ("a", "b")]
        assert int((update.roles.kind == mtu.MEMORY).sum()) == (0 if M is None else len(M))
        if seed % 2 == 0:
            new = J[torch.cat(retained)]
            M = (new if M is None else torch.cat([M, new]))[-20:]
        move(net)
    assert len(memory) == 20


def test_the_first_step_is_that_without_a_memory() -> None:
    found = []
    for memory in (None, mtu.Memory()):
        net, engine = build()
        backward(net, engine, memory, 0)
        found.append(grad_vector(list(net.parameters())))
    assert relative_error(found[1], found[0]) <= 1e-12


def test_size_is_by_default_four_times_the_retain_rows() -> None:
    net, engine = build()
    memory = mtu.Memory()
    for seed in range(12):
        backward(net, engine, memory, seed)
    assert memory.size == len(memory) == 4 * RETAINED
    P = sum(p.numel() for p in net.backbone.parameters())
    assert memory.memory >= 8 * P * len(memory)
    assert f"of {4 * RETAINED} rows" in repr(memory)


def test_products_of_kept_rows_are_those_of_their_steps() -> None:
    """None is made again, and they are those of the rows."""
    net, engine = build()
    memory = mtu.Memory(size=2 * RETAINED)
    for seed in range(7):
        backward(net, engine, memory, seed)
        rows, block = memory.held.rows, memory.held.block
        assert rows is not None and block is not None
        grams = block.grams
        assert len(grams) == 1
        J = torch.cat([part.flatten(1) for part in rows.jacobian().values()], 1)
        (gram,) = grams.values()
        assert relative_error(gram, J @ J.t()) <= 1e-12
        move(net)


def test_a_task_of_which_all_rests_gives_no_row() -> None:
    net, engine = build()
    kinds = {"a": mtu.RESTING * MASK.to(torch.int8), "b": torch.zeros(N, dtype=torch.int8)}
    update = backward(net, engine, mtu.Memory(), 0, forget=kinds)
    assert not (update.roles.kind == mtu.FORGET).any()
    found = grad_vector(trained(net.backbone))
    losses = net.losses(batch(0))
    loss = ALPHA * (losses["a"][~MASK].mean() + losses["b"].mean())
    expected = torch.autograd.grad(loss, trained(net.backbone))
    assert relative_error(found, torch.cat([g.flatten() for g in expected])) <= 1e-12


def test_beside_kept_rows_nothing_may_be_left_to_forget() -> None:
    """The step is one of retain rows alone, and they are kept; the next one forgets again."""
    net, engine = build()
    memory = mtu.Memory(size=4 * RETAINED, every=1)
    rests = {"a": mtu.RESTING * MASK.to(torch.int8), "b": torch.zeros(N, dtype=torch.int8)}
    for seed in range(6):
        forget = rests if seed % 2 else None
        update = backward(net, engine, memory, seed, forget=forget)
        assert (update.roles.kind == mtu.FORGET).any() == (forget is None)
        found = grad_vector(trained(net.backbone))
        losses = net.losses(batch(seed))
        loss = ALPHA * (losses["a"][~MASK].mean() + losses["b"].mean())
        repairs = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained(net.backbone))])
        if forget is not None:
            assert relative_error(found, repairs) <= 1e-12
        else:
            assert relative_error(found, repairs) > 0.1
        move(net)
    assert len(memory) == 4 * RETAINED


def test_the_interference_aware_method_is_orthogonal_to_kept_rows() -> None:
    net, engine = build()
    memory, subspace = mtu.Memory(size=RETAINED), mtu.Subspace(size=6 * N)
    method = mtu.InterferenceAware(0.0)
    for seed in range(9):
        clear(list(net.parameters()))
        engine.backward(
            net.losses(batch(seed)), method, forget=PARTIAL, subspace=subspace, memory=memory
        )
        move(net)
    kept = memory.held.rows
    assert kept is not None and subspace.full
    clear(list(net.parameters()))
    engine.backward(net.losses(batch(20)), method, forget=PARTIAL, subspace=subspace, memory=memory)
    d = {p: p.grad for p in trained(net.backbone)}
    size = grad_vector(trained(net.backbone)).norm()
    lengths = kept.gram().diagonal().sqrt()
    assert size > 0 and (kept.jvp(d).abs() <= 1e-6 * lengths * size).all()
