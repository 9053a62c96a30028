"""The line for `accelerator.backward`, in real loops of `accelerate`: accumulation, precision, checkpoints, ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.integrations import accelerate as ours
from tests.helpers.truth import relative_error
from tests.integrations.accelerates import accelerate, run
from tests.integrations.marks import marks
from tests.integrations.ranks import on_two
from tests.integrations.small import (
    COUNT,
    METHODS,
    RATE,
    STATES,
    Texts,
    batches,
    build,
    losses_of,
    moved,
    plain_step,
    weights,
)

pytestmark = [*marks(), pytest.mark.usefixtures("fresh_state")]


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_the_plain_loop(name: str, size: int) -> None:
    expected = plain_step(build(), METHODS[name]())
    found, updates, _ = run(METHODS[name](), size)
    assert relative_error(found, expected) <= 1e-6
    assert [update is None for update in updates] == [True] * (16 // size - 1) + [False]


def test_bf16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_step(build(), mtu.OrthoGrad(0.5))
    found, _, _ = run(mtu.OrthoGrad(0.5), mixed_precision="bf16")
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("size", [16, 4])
def test_gradient_checkpointing(size: int) -> None:
    found, _, model = run(mtu.OrthoGrad(0.5), size, checkpointing=True)
    assert model.is_gradient_checkpointing
    assert relative_error(found, plain_step(build(), mtu.OrthoGrad(0.5))) <= 1e-6


def over_ranks() -> list[Tensor]:
    """On each rank: half of the samples, in one micro-batch and in two."""
    found = []
    for size in (8, 4):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=8 // size)
        model = build()
        start = weights(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        loader = torch.utils.data.DataLoader(Texts(), batch_size=size)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        engine = mtu.Engine(wrapped)
        for batch in loader:
            with accelerator.accumulate(wrapped):
                losses, forget = losses_of(wrapped, batch), batch["forget"].bool()
                update = ours.backward(
                    accelerator, engine, losses, mtu.OrthoGrad(0.5), forget=forget
                )
                optimizer.step()
                optimizer.zero_grad()
        assert update is not None and len(update.roles) == COUNT
        found.append(moved(model, start))
    return found


def test_two_processes_are_one() -> None:
    expected = plain_step(build(), mtu.OrthoGrad(0.5))
    for rank in on_two(over_ranks):
        for found in rank:
            assert relative_error(found, expected) <= 1e-6


def kept(name: str, folder: Path, resume: bool) -> Tensor:
    """The weights after four passes, saved after the second; or after the last two."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, (method, subspace) = build(), (make() for make in STATES[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(Texts(), batch_size=4)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    engine = mtu.Engine(wrapped)
    state = ours.State(engine, method, subspace)
    accelerator.register_for_checkpointing(state)
    if resume:
        accelerator.load_state(str(folder))
    for epoch in range(2 if resume else 0, 4):
        for batch in loader:
            losses, forget = losses_of(wrapped, batch), batch["forget"].bool()
            more: dict[str, Any] = {"forget": forget, "subspace": subspace}
            ours.backward(accelerator, engine, losses, method, **more)
            optimizer.step()
            optimizer.zero_grad()
        if epoch == 1:
            accelerator.save_state(str(folder))
    return weights(model)


@pytest.mark.parametrize("name", STATES)
def test_a_state_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    whole = kept(name, tmp_path, False)
    assert torch.equal(kept(name, tmp_path, True), whole)


def test_a_state_of_two_processes_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, resumed = (on_two(kept, "rows", tmp_path, resume) for resume in (False, True))
    assert all(torch.equal(each, whole[0]) for each in (*whole, *resumed))
    with pytest.raises(ValueError, match="found rows kept by 2 processes, expected 1"):
        kept("rows", tmp_path, True)


def test_a_state_of_another_form_is_refused() -> None:
    engine = mtu.Engine(nn.Linear(2, 2))
    state = ours.State(engine, mtu.InterferenceAware(), mtu.Subspace()).state_dict()
    with pytest.raises(ValueError, match="found rows kept from earlier steps, expected no subspac"):
        ours.State(engine, mtu.Mean()).load_state_dict(state)
    with pytest.raises(ValueError, match="State: "):
        ours.State(engine, mtu.Mean()).load_state_dict({})
    with pytest.raises(TypeError, match=r"engine: found Linear, expected mtu.Engine"):
        ours.State(nn.Linear(2, 2), mtu.Mean())
    with pytest.raises(ValueError, match="Mean does not use one"):
        ours.State(engine, mtu.Mean(), mtu.Subspace())


def wrong_on_one_rank() -> Tensor:
    """Losses of another form on one rank; the step after it is in order."""
    torch.distributed.init_process_group("gloo")
    model = build()
    start, wrapped = weights(model), nn.parallel.DistributedDataParallel(model)
    engine, accelerator = mtu.Engine(wrapped), accelerate.Accelerator(cpu=True)
    rank, method = torch.distributed.get_rank(), mtu.OrthoGrad(0.5)
    for bad in (0, 1, None):
        batch = [*batches(Texts(), 8)][rank]
        losses, forget = losses_of(wrapped, batch), batch["forget"].bool()
        if bad is None:
            ours.backward(accelerator, engine, losses, method, forget=forget)
            break
        losses = losses.mean() if rank == bad else losses
        with pytest.raises(ValueError, match=f"rank {bad}: losses"):
            ours.backward(accelerator, engine, losses, method, forget=forget)
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return moved(model, start)


def test_what_one_rank_finds_wrong_all_raise() -> None:
    expected = plain_step(build(), mtu.OrthoGrad(0.5))
    for found in on_two(wrong_on_one_rank):
        assert relative_error(found, expected) <= 1e-6


def test_several_processes_are_refused() -> None:
    model = build()
    accelerator = SimpleNamespace(num_processes=2, sync_gradients=True, scaler=None)
    losses = model(input_ids=Texts().tokens).logits.mean((1, 2))
    with pytest.raises(RuntimeError, match="accelerate: found 2 processes"):
        ours.backward(accelerator, mtu.Engine(model), losses, mtu.OrthoGrad())
