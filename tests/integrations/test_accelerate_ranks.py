"""Two processes of Accelerate are one with the joined batch; or an error on both of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.integrations import accelerate as ours
from tests.integrations import shares
from tests.integrations.marks import marks
from tests.integrations.ranks import on_two
from tests.integrations.shares import PLANS, REFUSED, TWO, Net, Plan, same

pytest.importorskip("accelerate")

import accelerate
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs

pytestmark = marks()


def accelerated(plan: Plan) -> Tensor:
    """The loop of its documentation."""
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=plan.micro,
        kwargs_handlers=[DistributedDataParallelKwargs(**plan.ddp)],
        dataloader_config=DataLoaderConfiguration(even_batches=False),
    )
    net, method, subspace = Net(), plan.method(), plan.subspace()
    optimizers = plan.optimizers(net)
    schedules = plan.schedules(optimizers)
    data: Any = shares.items(plan.count)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=plan.size)
    model, loader = accelerator.prepare(net, loader)
    steppers = [accelerator.prepare(each) for each in (*optimizers, *schedules)]
    engine = mtu.Engine(model)
    for _ in range(plan.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                losses = shares.losses_of(model, batch)
                ours.backward(
                    accelerator, engine, losses, method, forget=batch[2], subspace=subspace
                )
                if accelerator.sync_gradients and plan.clip:
                    accelerator.clip_grad_norm_(model.parameters(), plan.clip)
                for each in steppers:
                    each.step()
                for each in steppers[: len(optimizers)]:
                    each.zero_grad()
    return shares.end_to_end(net)


@pytest.mark.parametrize("name", PLANS)
def test_accelerate(name: str) -> None:
    # its schedules move on by one for each process
    same(on_two(accelerated, PLANS[name]), *shares.alone(PLANS[name], ticks=2))


def test_accelerate_with_two_optimizers() -> None:
    same(on_two(accelerated, TWO), *shares.alone(TWO))


def refused_by_accelerate() -> None:
    with pytest.raises(ValueError, match=REFUSED):
        accelerated(Plan(ddp={"static_graph": True}))


def unlike_numbers_of_micro_batches() -> None:
    """14 samples by 2 are 4 and 3: at the last one rank steps, and the other has no more."""
    with pytest.raises(ValueError, match=r"sync: found \[False, True\] on the ranks"):
        accelerated(Plan(size=2, micro=2, count=14))


@pytest.mark.parametrize("function", [refused_by_accelerate, unlike_numbers_of_micro_batches])
def test_accelerate_refuses_on_both(function: Any) -> None:
    on_two(function)


def overflow_on_one_rank() -> Tensor:
    """A scaler leaves the step out on both, and lowers both scales."""
    torch.distributed.init_process_group("gloo")
    net = Net().float()
    model = nn.parallel.DistributedDataParallel(net)
    engine, optimizer = mtu.Engine(model), torch.optim.SGD(net.parameters(), lr=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    data = shares.items(12)
    x, _, forget = (torch.stack(column) for column in zip(*data, strict=True))
    start = shares.end_to_end(net)
    for step, bad_rank in enumerate((1, 0)):
        losses = model(x.float()).square().mean(1)
        if torch.distributed.get_rank() == bad_rank:
            losses = (losses.half() * 64).float()  # whose gradient is beyond float16
        update = ours.backward(accelerator, engine, losses, mtu.OrthoGrad(), forget=forget)
        assert update is None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == 2.0 ** (15 - step)
    assert torch.equal(shares.end_to_end(net), start)
    return start


def test_an_overflow_on_one_rank_skips_the_step_on_both() -> None:
    on_two(overflow_on_one_rank)
