"""Steps of models of FSDP2 are those of one process on the joined batch. Run by `worker`."""

from __future__ import annotations

import copy

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

import mtu_fast as mtu
from tests.distributed.scene import (
    accumulated,
    case,
    interference_aware,
    joined,
    mine,
    net,
    per_rank,
    rows_of,
    step,
    ten_step_methods,
    train,
)
from tests.distributed.sharded import check_rows, same_values, same_whole, shard, sharded, whole


@case
def fsdp_one_backward_leaves_the_same() -> None:
    for method in (mtu.OrthoGrad(0.3), mtu.OrthoGrad(0.3, "layer"), mtu.Mean(), mtu.PCGrad(),
                   mtu.UPGrad(), mtu.GradDiff(0.4), mtu.GradVac()):  # fmt: skip
        it, batches = sharded(), per_rank()
        step(it, batches, method)
        same_whole(it.inside, it.plain)


@case
def fsdp_ten_steps() -> None:
    # the pairs of method and optimizer that `ten_steps` leaves out
    for i, method, kind in ten_step_methods(1):
        train(sharded(reshard_after_forward=i % 2 == 0), kind, method, same_values)


@case
def fsdp_interference_aware() -> None:
    interference_aware(sharded(), torch.optim.AdamW, same_values)


@case
def fsdp_kept_constraints() -> None:
    for memory, method in (
        ({"size": 9}, mtu.OrthoGrad(0.3)),
        ({"keep": "conflicting", "budget": 20 * 1500}, mtu.LevelledOrthoGrad()),
    ):
        ours, plain = mtu.Memory(**memory), mtu.Memory(**memory)
        more = {"memory": ours, "plain": {"memory": plain}}
        train(sharded(), torch.optim.AdamW, method, same_values, **more)
        assert len(ours) == len(plain) > 3


@case
def fsdp_accumulation() -> None:
    it, calls = sharded(), [per_rank(i) for i in range(2)]
    step(it, calls[0], mtu.Mean())
    step(it, calls[0], mtu.Mean())
    same_whole(it.inside, it.plain)  # .grad is added to
    ours = mtu.cat(*(rows_of(it.engine, it.model, mine(batches)) for batches in calls))
    truth = mtu.cat(*(rows_of(it.alone, it.plain, joined(batches)) for batches in calls))
    check_rows(ours, truth)


@case
def fsdp_accumulated_steps() -> None:
    for method in (mtu.OrthoGrad(0.3), mtu.PCGrad(), mtu.GradDiff(0.4)):
        accumulated(sharded(), same_whole, method)
    accumulated(sharded(everything=True), same_whole, mtu.PCGrad())


@case
def fsdp_frozen_parameters() -> None:
    it = sharded(everything=True)
    for model in (it.inside, it.plain):
        for module in (model.conv, model.heads["a"]):
            module.requires_grad_(False)
    for i in range(2):
        step(it, per_rank(i), mtu.OrthoGrad(0.3))
        for p, q in zip(it.inside.parameters(), it.plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == (not p.requires_grad)
    same_whole(it.inside, it.plain)


@case
def fsdp_mixed_precision() -> None:
    """Parameters are gathered as float32; rows are those of a model of float32, .grad is float64."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    it = sharded(mp_policy=policy, everything=True)
    low = copy.deepcopy(it.plain).float()
    alone = mtu.Engine(low, group=None)
    batches = per_rank()
    every = joined(batches)
    every.x = every.x.float()
    update = it.engine.backward(
        mine(batches).losses(it.model), mtu.OrthoGrad(0.3), forget=mine(batches).forget
    )
    truth = alone.backward(every.losses(low), mtu.OrthoGrad(0.3), forget=every.forget)
    assert update.gram is not None and truth.gram is not None
    order = torch.arange(len(truth.roles))
    assert float((update.gram - truth.gram[order][:, order]).norm() / truth.gram.norm()) < 1e-5
    for p, q in zip(it.inside.parameters(), low.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and p.grad.dtype == torch.float64
        assert float((whole(p.grad) - q.grad).norm()) <= 1e-4 * float(q.grad.norm())


@case
def fsdp_badly_conditioned_rows() -> None:
    """float32 rows that are nearly dependent: the direction is refined, slice by slice."""
    model, plain = net().float(), net().float()
    shard(model, (model.conv,))
    engine, alone = mtu.Engine(model, model.shared), mtu.Engine(plain, plain.shared, group=None)
    batches = per_rank(sizes=(6, 6, 6, 6))
    for data in batches:
        data.x = data.x.float()
        data.x[1] = data.x[3] + 1e-4 * data.x[1]
        data.words[1] = data.words[3]
    ours = rows_of(engine, model, mine(batches)).backward(mtu.OrthoGrad(0.3))
    truth = rows_of(alone, plain, joined(batches)).backward(mtu.OrthoGrad(0.3))
    assert ours.residual is not None and truth.residual is not None
    assert float(ours.residual) <= max(2 * float(truth.residual), 1e-5)


@case
def fsdp_ordinary_backward_goes_on() -> None:
    it = sharded(everything=True)
    for i in range(2):
        step(it, per_rank(i), mtu.OrthoGrad(0.3))
        for model in (it.inside, it.plain):
            model.zero_grad()
        batches = per_rank(7, sizes=(4, 4, 4, 4))
        sum(loss.mean() for loss in mine(batches).losses(it.model).values()).backward()
        sum(loss.mean() for loss in joined(batches).losses(it.plain).values()).backward()
        same_whole(it.inside, it.plain)
