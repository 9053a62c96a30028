"""What is not supported, and what one rank finds wrong, is raised by all of them."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import mtu_fast as mtu
from tests.distributed.scene import (
    case,
    mine,
    net,
    pair,
    per_rank,
    raises,
    rows_of,
)


@case
def nothing_given_warns() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        mtu.Engine(net())
    assert len(found) == 1 and issubclass(found[0].category, RuntimeWarning)
    text = str(found[0].message)
    assert "nothing is synchronised" in text and "group=None" in text
    assert found[0].filename == __file__, found[0].filename


@case
def settings_of_ddp_are_refused() -> None:
    model = nn.parallel.DistributedDataParallel(net(), static_graph=True)
    with raises(ValueError, "static_graph=True"):
        mtu.Engine(model)
    hooked = nn.parallel.DistributedDataParallel(net())
    hooked.register_comm_hook(None, lambda state, bucket: bucket.get_future())
    with raises(ValueError, "communication hook"):
        mtu.Engine(hooked)


@case
def a_join_of_unlike_shares_is_refused() -> None:
    """On all ranks, before one of them has left, and before anything is sent that it would not answer."""
    it, data = pair(wrapped=True), mine(per_rank())
    model: Any = it.model
    held = partial(it.engine.accumulate, sync=False)
    for call in (it.engine.backward, held, partial(held, sync=True)):
        for method in (mtu.OrthoGrad(), mtu.PCGrad(), mtu.GradDiff()):
            with raises(ValueError, "within Join", "as many batches"), Join([model]):
                call(data.losses(model), method, forget=data.forget)
    assert not it.engine._taking.ranks.sent


@case
def other_wrappers_are_refused() -> None:
    """Known by their names: none of them can be made here."""
    for module, name, word, base in (
        ("torch.distributed.fsdp.fully_sharded", "FullyShardedDataParallel", "FSDP1", nn.Module),
        ("deepspeed.runtime.engine", "DeepSpeedEngine", "DeepSpeed", nn.Module),
        ("torch.distributed.pipelining.stage", "_PipelineStageBase", "pipeline", object),
    ):
        wrapper = type(name, (base,), {"__module__": module})
        inside = nn.Sequential(wrapper()) if base is nn.Module else wrapper()
        with raises(ValueError, word, "DistributedDataParallel"):
            mtu.Engine(inside)


@case
def copies_over_two_dimensions_are_refused() -> None:
    """Two groups, slices under copies, a mesh of which FSDP2 has one dimension: on every rank, before any step."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("copies", "slices"))
    alone = [dist.new_group([rank]) for rank in range(size)][dist.get_rank()]
    ddp = nn.parallel.DistributedDataParallel
    several = nn.Sequential(ddp(nn.Linear(3, 3)), ddp(nn.Linear(3, 3), process_group=alone))
    with raises(ValueError, "2 different process groups"):
        mtu.Engine(several)
    slices = nn.Sequential(nn.Linear(3, 4 * size))
    parallelize_module(slices, mesh["slices"], {"0": ColwiseParallel()})
    for group in ({}, {"group": mesh["slices"].get_group()}):
        with raises(ValueError, "DistributedDataParallel over a tensor parallel"):
            mtu.Engine(ddp(slices, device_mesh=mesh["copies"]), **group)
    wide = init_device_mesh("cpu", (size, 1), mesh_dim_names=("a", "b"))
    sharded = nn.Linear(3, 4)
    fully_shard(sharded, mesh=wide["b"])
    with raises(
        ValueError, f"one dimension of a mesh of shape ({size}, 1)", "group=mesh.get_group()"
    ):
        mtu.Engine(sharded)
    assert mtu.Engine(sharded, group=wide["b"].get_group()).is_joined
    with raises(ValueError, "replicate()", "DistributedDataParallel"):
        mtu.Engine(replicate(nn.Linear(3, 3)))


@case
def a_group_of_another_kind() -> None:
    with raises(TypeError, "expected a process group"):
        mtu.Engine(net(), group="world")


@case
def a_loss_that_is_reduced_on_one_rank() -> None:
    for method in (mtu.OrthoGrad(), mtu.PCGrad(), mtu.GradDiff()):
        it, data = pair(), mine(per_rank())
        losses = data.losses(it.model)
        if dist.get_rank() == 1:
            losses["a"] = losses["a"].mean()
        with raises(ValueError, "rank 1:", "already reduced"):
            it.engine.backward(losses, method, forget=data.forget)
        assert all(p.grad is None for p in it.inside.parameters())


@case
def a_loss_that_is_not_finite_on_one_rank() -> None:
    it, data = pair(), mine(per_rank())
    losses = data.losses(it.model)
    if dist.get_rank() == 0:
        losses["b"] = losses["b"] * torch.nan
    with raises(ValueError, "rank 0:", "non-finite"):
        it.engine.rows(losses)


@case
def a_row_that_is_not_finite_on_one_rank() -> None:
    for method in (mtu.OrthoGrad(), mtu.PCGrad(), mtu.GradDiff(), "weights"):
        it, data = pair(), mine(per_rank())
        losses = data.losses(it.model)
        if dist.get_rank() == 1:
            zero = it.inside.norm.weight[:1] * 0.0
            losses["a"] = losses["a"] + zero.sqrt()  # finite, of slope 0 · infinity
        with raises(mtu.NotFiniteError, "rank 1"):
            if method == "weights":
                rows = it.engine.rows(losses, forget=data.forget)
                rows.backward(torch.ones(len(rows)))
            else:
                it.engine.backward(losses, method, forget=data.forget)
        assert all(p.grad is None for p in it.inside.parameters())


@case
def a_step_between_micro_batches_on_one_rank() -> None:
    """Whether rows are held, or their means."""
    for method in (mtu.OrthoGrad(), mtu.PCGrad()):
        it, data = pair(), mine(per_rank())
        it.engine.accumulate(data.losses(it.model), method, forget=data.forget, sync=False)
        if dist.get_rank() == 1:
            with torch.no_grad():
                it.inside.norm.weight.add_(1e-3)
        losses = data.losses(it.model)
        with raises(RuntimeError, "rank 1: rows: parameters changed"):
            it.engine.accumulate(losses, method, forget=data.forget, sync=True)
        assert it.engine.accumulated_bytes == 0
        assert all(p.grad is None for p in it.inside.parameters())


@case
def a_step_on_one_rank_alone() -> None:
    """As at the end of shares of unlike length."""
    for method in (mtu.OrthoGrad(), mtu.PCGrad()):
        it, data = pair(), mine(per_rank())
        it.engine.accumulate(data.losses(it.model), method, forget=data.forget, sync=False)
        losses, sync = data.losses(it.model), dist.get_rank() == 0
        with raises(ValueError, "sync: found [True, False", "as many micro-batches"):
            it.engine.accumulate(losses, method, forget=data.forget, sync=sync)
        assert all(p.grad is None for p in it.inside.parameters())


@case
def methods_of_unlike_rows_on_the_ranks() -> None:
    it, data = pair(), mine(per_rank())
    method = mtu.PCGrad() if dist.get_rank() else mtu.OrthoGrad()
    with raises(ValueError, "rows per task: found [False, True"):
        it.engine.accumulate(data.losses(it.model), method, forget=data.forget, sync=True)
    with raises(ValueError, "different exchanges", "'engine.rows', 'engine.rows: means'"):
        it.engine.backward(data.losses(it.model), method, forget=data.forget)
    assert all(p.grad is None for p in it.inside.parameters())


@case
def a_row_that_is_too_short_on_one_rank() -> None:
    it, data = pair(), mine(per_rank())
    losses = data.losses(it.model)
    if dist.get_rank() == 1:
        factors = torch.ones_like(losses["a"])
        factors[0] = 2.0**-700
        losses["a"] = losses["a"] * factors
    with raises(ValueError, "rank 1:", "('a', 0)", "underflow"):
        it.engine.backward(losses, mtu.OrthoGrad(), forget=data.forget)


@case
def parameters_that_changed_on_one_rank() -> None:
    for ask in (lambda rows: rows.gram(), lambda rows: rows.backward(mtu.OrthoGrad())):
        it, data = pair(), mine(per_rank())
        rows = rows_of(it.engine, it.model, data)
        if dist.get_rank() == 1:
            with torch.no_grad():
                it.inside.conv.bias.add_(1)
        with raises(RuntimeError, "rank 1:", "changed in place"):
            ask(rows)


@case
def engines_that_differ() -> None:
    model = net()
    params = model.shared if dist.get_rank() == 0 else model.shared[:-1]
    engine = mtu.Engine(model, params, group=dist.group.WORLD)
    with raises(ValueError, "rank 1", "other parameters"):
        engine.rows(mine(per_rank()).losses(model))
    with raises(ValueError, "rank 1", "other parameters"):
        engine.rows(mine(per_rank()).losses(model), per="task")


@case
def weights_that_differ() -> None:
    model = net()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.linear.weight[0, 0] += 1e-9
    engine = mtu.Engine(model, model.shared, group=dist.group.WORLD)
    with raises(ValueError, "rank 1", "copies of one model"):
        engine.rows(mine(per_rank()).losses(model))


@case
def a_sparse_table() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, sparse=True)

        def forward(self, words: Tensor) -> Tensor:
            return self.table(words).square().sum((1, 2))

    torch.manual_seed(0)
    model = Words()
    engine = mtu.Engine(model, group=dist.group.WORLD)
    with raises(ValueError, "sparse"):
        engine.rows(model(torch.zeros(2, 2, dtype=torch.int64)))


@case
def statistics_over_ranks() -> None:
    """Backward passes of SyncBatchNorm wait for one another; ours are not as many on every rank."""
    from mtu_fast._distributed.wrappers import check_nodes

    with raises(ValueError, "SyncBatchNorm"):
        check_nodes(["AddmmBackward0", "SyncBatchNormBackward"])


@case
def a_basis_over_ranks() -> None:
    it = pair()
    subspace = mtu.Subspace(size=4, basis=True)
    with raises(ValueError, "basis=True"):
        for i in range(3):
            subspace.keep(rows_of(it.engine, it.model, mine(per_rank(i))))
