"""Units of FSDP2 in graphs of any kind, gathered and summed one at a time, and over two dimensions. Run by `worker`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import mtu_fast as mtu
from tests.distributed.scene import batch, both, case, per_rank, step
from tests.distributed.sharded import check_rows, is_sharded, same_whole, shard, sharded


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
