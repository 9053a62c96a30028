"""Models of FSDP2 beside what one process computes on the joined batch: rows, and what is refused. Run by `worker`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import mtu_fast as mtu
from tests.distributed.scene import (
    Pair,
    both,
    case,
    close,
    joined,
    mine,
    net,
    per_rank,
    raises,
    rows_of,
    same_everywhere,
    step,
)


def shard(model: nn.Module, units: tuple[nn.Module, ...], **settings: Any) -> None:
    for unit in units:
        fully_shard(unit, **settings)
    fully_shard(model, **settings)


def sharded(everything: bool = False, units: bool = True, **settings: Any) -> Pair:
    model, plain = net(), net()
    # a unit of a head that a rank may not use, and the rest in the outermost one
    shard(model, (model.conv, model.heads["b"]) if units else (), **settings)
    params = None if everything else model.shared
    alone = mtu.Engine(plain, None if everything else plain.shared, group=None)
    return Pair(model, mtu.Engine(model, params), plain, alone, model)


def whole(t: Any) -> Tensor:
    found: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return found


def is_sharded(model: nn.Module) -> bool:
    return all(hasattr(p, "full_tensor") for p in model.parameters())


def same_whole(one: nn.Module, other: nn.Module, grads: bool = True) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        a, b = (p.grad, q.grad) if grads else (p.detach(), q.detach())
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert type(a).__name__ == "DTensor", name
            close(whole(a), b)


def same_values(one: nn.Module, other: nn.Module) -> None:
    same_whole(one, other, grads=False)


def check_rows(ours: mtu.Rows, truth: mtu.Rows) -> None:
    assert len(ours) == len(truth) and ours.roles.tasks == truth.roles.tasks
    close(ours.roles.loss, truth.roles.loss)
    G = ours.gram()
    same_everywhere(G)
    close(G, truth.gram())
    for per in ("layer", "tensor"):
        close(ours.gram(per), truth.gram(per))
    w = torch.randn(len(truth), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d, wanted = ours.vjp(w), truth.vjp(w)
    assert list(ours.parameters) == list(truth.parameters)
    for name, p in ours.parameters.items():
        q = truth.parameters[name]
        assert (p in d) == (q in wanted)
        if p in d:
            close(whole(d[p]), wanted[q])
    close(ours.jvp(d), truth.jvp(wanted))
    close(ours.jvp(d, "layer"), truth.jvp(wanted, "layer"))


@case
def fsdp_rows() -> None:
    for reshard in (True, False):
        it = sharded(reshard_after_forward=reshard)
        # a plan is checked again at the fourth, which two ranks are enough to see
        for i in range(4 if reshard and dist.get_world_size() == 2 else 2):
            check_rows(*both(it, per_rank(i)))
            assert is_sharded(it.inside)


@case
def fsdp_of_one_unit() -> None:
    it = sharded(units=False, everything=True)
    for per in ("sample", "task"):
        check_rows(*both(it, per_rank(), per=per))


@case
def fsdp_mean_rows() -> None:
    for reshard in (True, False):
        it = sharded(reshard_after_forward=reshard)
        for i in range(2):
            check_rows(*both(it, per_rank(i), per="task"))


@case
def fsdp_empty_batch() -> None:
    for sizes in ((0, 3, 2, 1), (3, 0, 0, 0)):
        for per in ("sample", "task"):
            check_rows(*both(sharded(), per_rank(sizes=sizes), per=per))


@case
def fsdp_tasks_of_some_ranks() -> None:
    """Rank 0 has one pass, the others two: parameters are gathered for those that need them."""
    for per in ("sample", "task"):
        it, batches = sharded(), per_rank()
        batches[0].tasks = ("a",)
        all_of_them = joined(batches)
        all_of_them.present["b"][: len(batches[0].forget)] = False
        ours = rows_of(it.engine, it.model, mine(batches), per=per)
        check_rows(ours, rows_of(it.alone, it.plain, all_of_them, per=per))


@case
def fsdp_two_forwards_before_rows() -> None:
    it, batches = sharded(), [per_rank(0), per_rank(1)]
    ours = [mine(each).losses(it.model) for each in batches]
    truth = [joined(each).losses(it.plain) for each in batches]
    for losses, wanted in zip(ours, truth, strict=True):
        check_rows(it.engine.rows(losses), it.alone.rows(wanted))


@case
def fsdp_an_error_of_one_rank() -> None:
    it, data = sharded(), mine(per_rank())
    losses = data.losses(it.model)
    if dist.get_rank() == 1:
        losses["a"] = losses["a"].mean()
    with raises(ValueError, "rank 1:", "already reduced"):
        it.engine.backward(losses, mtu.OrthoGrad(), forget=data.forget)
    assert is_sharded(it.inside)
    step(it, per_rank(), mtu.OrthoGrad(0.3))
    same_whole(it.inside, it.plain)


@case
def fsdp_parameters_that_changed() -> None:
    it = sharded()
    rows = rows_of(it.engine, it.model, mine(per_rank()))
    with torch.no_grad():
        for p in it.inside.parameters():
            p.mul_(2.0)
    with raises(RuntimeError, "changed in place"):
        rows.backward(mtu.OrthoGrad())


@case
def fsdp_refusals() -> None:
    model = net()
    fully_shard(model)
    with raises(ValueError, "mesh", "Leave group= out"):
        mtu.Engine(model, group=None)
    it = sharded()
    rows = rows_of(it.engine, it.model, mine(per_rank()))
    means = rows_of(it.engine, it.model, mine(per_rank()), per="task")
    with raises(ValueError, "one kind"):
        mtu.cat(rows, means)


@case
def fsdp_a_gradient_that_is_not_finite_on_one_rank() -> None:
    for method in (mtu.GradDiff(), mtu.PCGrad()):
        it, data = sharded(everything=True), mine(per_rank())
        losses = data.losses(it.model)
        if dist.get_rank() == 1:
            zero = losses["a"].sum() * 0.0
            losses["a"] = losses["a"] + zero.sqrt()  # finite, of slope 0 · infinity
        with raises(mtu.NotFiniteError, "rank 1"):
            it.engine.backward(losses, method, forget=data.forget)
        assert all(p.grad is None for p in it.inside.parameters()) and is_sharded(it.inside)
