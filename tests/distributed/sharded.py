"""Models of FSDP2 beside what one process computes on the joined batch. Run by `worker`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import mtu_fast as mtu
from tests.distributed.scene import (
    Pair,
    accumulated,
    batch,
    both,
    case,
    close,
    joined,
    mine,
    nabla_tau,
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
    heads = (model.heads["a"], model.heads["b"])
    shard(model, (model.conv, model.norm, *heads) if units else (), **settings)
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
        for i in range(4):
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
def fsdp_one_backward_leaves_the_same() -> None:
    for method in (mtu.OrthoGrad(0.3), mtu.OrthoGrad(0.3, "layer"), mtu.Mean(), mtu.PCGrad(),
                   mtu.UPGrad(), mtu.GradDiff(0.4), mtu.GradVac()):  # fmt: skip
        it, batches = sharded(), per_rank()
        step(it, batches, method)
        same_whole(it.inside, it.plain)


@case
def fsdp_ten_steps() -> None:
    methods = (mtu.OrthoGrad(0.3), mtu.PCGrad(), mtu.UPGrad(), mtu.GradDiff(0.4), nabla_tau())
    kinds: tuple[Any, ...] = (torch.optim.SGD, torch.optim.AdamW)
    for i, method in enumerate(methods):
        # all pairs with two ranks; each method and each optimizer with more
        for kind in kinds if dist.get_world_size() == 2 else kinds[i % 2 :][:1]:
            train(sharded(reshard_after_forward=i % 2 == 0), kind, method)


@case
def fsdp_interference_aware() -> None:
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        ours, plain = mtu.Subspace(size=12, every=2), mtu.Subspace(size=12, every=2)
        more = {"subspace": ours, "plain": {"subspace": plain}}
        train(sharded(), kind, mtu.InterferenceAware(), **more)
        assert len(ours) == len(plain) >= 12 and ours.full


@case
def fsdp_kept_constraints() -> None:
    for memory, method in (
        ({"size": 9}, mtu.OrthoGrad(0.3)),
        ({"keep": "conflicting", "budget": 20 * 1500}, mtu.LevelledOrthoGrad()),
    ):
        ours, plain = mtu.Memory(**memory), mtu.Memory(**memory)
        more = {"memory": ours, "plain": {"memory": plain}}
        train(sharded(), torch.optim.AdamW, method, **more)
        assert len(ours) == len(plain) > 3


def train(it: Pair, kind: Any, method: Any, **more: Any) -> None:
    optimizers = [kind(model.parameters(), lr=1e-2) for model in (it.inside, it.plain)]
    for i in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        step(it, per_rank(i), method, **dict(more))
        for optimizer in optimizers:
            optimizer.step()
    same_whole(it.inside, it.plain, grads=False)


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
def fsdp_two_forwards_before_rows() -> None:
    it, batches = sharded(), [per_rank(0), per_rank(1)]
    ours = [mine(each).losses(it.model) for each in batches]
    truth = [joined(each).losses(it.plain) for each in batches]
    for losses, wanted in zip(ours, truth, strict=True):
        check_rows(it.engine.rows(losses), it.alone.rows(wanted))


class Block(nn.Module):
    """What has no rule, a mean over samples, and a function of a parameter."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.second = nn.utils.parametrizations.weight_norm(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "checkpoint":
            h: Tensor = checkpoint(self._inside, x, use_reentrant=False)
            return x + h
        return x + self._inside(x)

    def _inside(self, x: Tensor) -> Tensor:
        h = torch.cumsum(self.first(x), 1).sin() * self.gain.exp()
        if self.kind == "mixed":
            h = h - h.mean(0)
        return self.second(torch.special.i0e(h)) * self.gain


def blocks(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(Block(5, kind) for _ in range(2))).double()


def losses_of(model: Callable[..., Any], x: Tensor) -> Tensor:
    found: Tensor = model(x).square().sum(1)
    return found


@case
def fsdp_any_graph() -> None:
    """Ops without a rule, rows that meet, checkpoints: nodes run outside a pass ask for what they saved."""
    for kind in ("plain", "mixed", "checkpoint"):
        model, plain = blocks(kind), blocks(kind)
        shard(model, tuple(model), reshard_after_forward=True)
        engine, alone = mtu.Engine(model), mtu.Engine(plain, group=None)
        for i in range(2):
            x = [batch(9 * i + r, 3).x.flatten(1)[:, :5] for r in range(dist.get_world_size())]
            ours = engine.rows(losses_of(model, x[dist.get_rank()]))
            if kind == "mixed":  # the mean is that of a rank's samples
                truth = mtu.cat(*(alone.rows(losses_of(plain, each)) for each in x))
            else:
                truth = alone.rows(losses_of(plain, torch.cat(x)))
            check_rows(ours, truth)
            assert is_sharded(model)
        if kind != "mixed":
            ours = engine.rows(losses_of(model, x[dist.get_rank()]), per="task")
            check_rows(ours, alone.rows(losses_of(plain, torch.cat(x)), per="task"))


@case
def fsdp_nested_units() -> None:
    model, plain = blocks("plain"), blocks("plain")
    for block in model:
        fully_shard(block.first)
    shard(model, (model[1],))
    engine, alone = mtu.Engine(model), mtu.Engine(plain, group=None)
    for i in range(3):
        x = [batch(9 * i + r, 3).x.flatten(1)[:, :5] for r in range(dist.get_world_size())]
        ours = engine.rows(losses_of(model, x[dist.get_rank()]))
        check_rows(ours, alone.rows(losses_of(plain, torch.cat(x))))


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


@case
def fsdp_over_two_dimensions() -> None:
    """HSDP: slices within a line of the mesh, copies across; on an even number of ranks."""
    size = dist.get_world_size()
    if size % 2:
        return
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "shards"))
    for per in ("sample", "task"):
        check_rows(*both(sharded(mesh=mesh), per_rank(), per=per))
    for method in (mtu.OrthoGrad(0.3), mtu.GradDiff(0.4)):
        it = sharded(mesh=mesh)
        step(it, per_rank(), method)
        same_whole(it.inside, it.plain)


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
def fsdp_gathers_a_unit_at_a_time() -> None:
    """Beside the outermost unit no more than one is whole at a time, also where a plan is made and checked."""
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)]
    model = nn.Sequential(*layers, nn.Linear(8, 8)).double()
    shard(model, tuple(layers))
    engine = mtu.Engine(model)
    units = engine._taking._units
    assert units is not None
    gather, most = units._gather, [0]

    def counted(u: int, keep: bool) -> None:
        gather(u, keep)
        most.append(sum(group.is_unsharded for group in units._groups))

    units._gather = counted  # type: ignore[method-assign]
    for method in (mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()):
        for _ in range(3):
            losses = losses_of(model, torch.randn(3, 8, dtype=torch.float64))
            engine.backward(losses, method, forget=torch.arange(3) == 0)
    assert len(most) > 20 and max(most) <= 2


@case
def fsdp_sums_a_unit_at_a_time() -> None:
    """Mean rows, and methods without a Gram: beside slices, no more than one unit's gradients are there."""
    from mtu_fast._distributed.streaming import Stream

    torch.manual_seed(4)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)]
    model = nn.Sequential(*layers, nn.Linear(8, 8)).double()
    plain = copy.deepcopy(model)
    shard(model, tuple(layers))
    engine, alone = mtu.Engine(model), mtu.Engine(plain, group=None)
    most, take = [0], Stream._take

    def counted(stream: Stream, p: Tensor, g: Tensor) -> Tensor:
        left = take(stream, p, g)
        assert left.untyped_storage().nbytes() == left.element_size()
        most.append(sum(t.numel() for pending in stream._pending for t in pending.values()))
        return left

    Stream._take = counted  # type: ignore[method-assign, assignment]
    try:
        for method in (mtu.GradDiff(), mtu.PCGrad(), mtu.UPGrad()):
            x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
            own = x[dist.get_rank() :: dist.get_world_size()]
            engine.backward(losses_of(model, own), method, forget=own[:, 0] > 0)
            order = torch.cat([x[r :: dist.get_world_size()] for r in range(dist.get_world_size())])
            alone.backward(losses_of(plain, order), method, forget=order[:, 0] > 0)
            same_whole(model, plain)
            model.zero_grad()
            plain.zero_grad()
    finally:
        Stream._take = take  # type: ignore[method-assign]
    # the outermost unit has one layer of its own
    assert len(most) > 20 and 0 < max(most) <= 2 * (8 * 8 + 8)


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
