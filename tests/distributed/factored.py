"""Rows that ranks keep as factors: as one process keeps them, and dealt out anew. Run by `worker`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._rows import keeping
from tests.distributed.running import (
    folder,
    losses,
    model_of,
    mtu_alone,
    parameters_of,
    run,
    same_kept,
    same_run,
    shares,
    subspace,
    wrapped,
)
from tests.distributed.scene import case, close, raises, same_everywhere
from tests.kept import factors as kept

FACTORED = {"0.weight", "2.weight"}


@contextmanager
def few() -> Iterator[None]:
    """Parameters of any size may be kept as factors."""
    with patch.object(keeping, "FEW", 0):
        yield


def factored(memory: mtu.Memory) -> set[str]:
    """The parameters of which this rank keeps factors of all rows that it has, or a process has."""
    rows, block = memory.held.rows, memory.held.block
    assert rows is not None and block is not None
    names = list(rows.parameters)
    if hasattr(block, "factors"):
        return {names[j] for j in block.factors}
    own = [part.factors for part in block.parts if len(part)]
    return {names[j] for j in frozenset.intersection(*own)} if own else FACTORED


@case
def kept_factors() -> None:
    """Steps to the parameters of one process, in as many bytes; a memory goes on from its state."""
    for kind in ("ddp", "fsdp"):
        for options in ({"size": 9}, {"keep": "conflicting", "budget": 9 * 8 * 40}):
            with few():
                model, plain = wrapped(kind), model_of()
                ours, alone = mtu.Memory(**options), mtu.Memory(**options)
                method = mtu.OrthoGrad(0.5)
                history = run(model, shares, method, 7, memory=ours)
                truth = mtu_alone(plain, method, 7, dist.get_world_size(), memory=alone)
            same_run(history, truth)
            for p, q in zip(parameters_of(model), plain.parameters(), strict=True):
                close(p, q.detach())
                same_everywhere(p)
            assert len(ours) == len(alone) == 9 or "budget" in options
            assert len(ours) == len(alone) and factored(ours) == factored(alone) == FACTORED
            assert ours.held.block is not None and alone.held.block is not None
            assert ours.held.block.row_nbytes == alone.held.block.row_nbytes
            check_state(model, ours)


def check_state(model: nn.Module, memory: mtu.Memory) -> None:
    """A memory that loads what this one holds has its products; a part that is damaged is named on all ranks."""
    engine, again = mtu.Engine(model), mtu.Memory(9)
    state = memory.state_dict()
    again.load_state_dict(state, engine.subspace_rows)
    assert factored(again) == FACTORED and len(again) == len(memory)
    close(products(again), products(memory))
    if dist.get_rank() == 0:
        for part in state["block"]["parts"]:
            for uses in part["factors"].values():
                uses[0]["kind"] = "none"
    with raises(ValueError, "kind: found 'none'"):
        again.load_state_dict(state, engine.subspace_rows)


def products(memory: mtu.Memory) -> Tensor:
    assert memory.held.rows is not None
    return memory.held.rows.gram()


@case
def kept_factors_on_fewer_ranks() -> None:
    """The rows are dealt out anew, as factors, and to one process; what it stores is dealt out again."""
    size = dist.get_world_size()
    group = dist.new_group(list(range(size - 1)))
    method = mtu.InterferenceAware()
    path = folder() / "run.pt"
    before, after, last = subspace(), subspace(), subspace()
    go_on = partial(run, method=method, checkpoint=path)
    with few():
        go_on(wrapped("ddp"), shares, steps=6, **before)
        wanted = products(before["memory"])
        if dist.get_rank() < size - 1:
            fewer = partial(shares, group=group)
            go_on(wrapped("ddp", group), fewer, steps=6, **after)  # nothing is left to do
            same_kept(before["memory"], after["memory"])
            assert factored(after["memory"]) == FACTORED
            close(products(after["memory"]), wanted)
            go_on(wrapped("ddp", group), fewer, steps=9, **after)
        dist.barrier()
        go_on(wrapped("ddp"), shares, steps=9, **last)
        if dist.get_rank() < size - 1:
            same_kept(after["memory"], last["memory"])
            wanted = products(after["memory"])
        found = products(last["memory"])
        assert factored(last["memory"]) == FACTORED
        if dist.get_rank() < size - 1:
            close(found, wanted)


@case
def kept_factors_of_a_rank_without_rows() -> None:
    """Whose say in how large they are is none."""
    with few():
        model = wrapped("ddp")
        engine, memory = mtu.Engine(model), mtu.Memory(every=1)
        for seed in range(3):
            drawn = torch.Generator().manual_seed(seed)
            count = 4 if dist.get_rank() == 0 else 0
            x = torch.randn(count, 5, generator=drawn, dtype=torch.float64)
            y = torch.randint(3, (count,), generator=drawn)
            forget = torch.arange(count) < 2
            model.zero_grad()
            found: Any = losses(model, (x, y))
            engine.backward(found, mtu.OrthoGrad(0.5), forget=forget, memory=memory)
        block = memory.held.block
        assert block is not None and len(memory) == 6 and factored(memory) == FACTORED
        # 5 + 8 and 8 + 3 numbers of factors, and two biases
        assert block.row_nbytes == 8 * (13 + 11 + 11)
        assert block.nbytes == (6 * block.row_nbytes if dist.get_rank() == 0 else 0)


@case
def kept_factors_of_tasks_with_heads_of_their_own() -> None:
    """A budget has room for as many rows as on one process, and a share for each task that has some."""
    # 11 rows of 8448 bytes, factors of all four layers
    some: list[dict[str, Any]] = [{"budget": 100_000}, {"tasks": ("b",), "per_task": True}]
    size = dist.get_world_size()
    torch.manual_seed(4)
    for options in some:
        model, plain = kept.Deep().double(), kept.Deep().double()
        plain.load_state_dict(model.state_dict())
        engine, alone = mtu.Engine(model, group=dist.group.WORLD), mtu.Engine(plain, group=None)
        ours, truth = (mtu.Memory(20, every=1, keep="conflicting", **options) for _ in "ab")
        for step in range(3):
            batches = [kept.batch(10 * step + rank) for rank in range(size)]
            steps = (
                (model, engine, ours, batches[dist.get_rank()], kept.MASK),
                (plain, alone, truth, torch.cat(batches), kept.MASK.repeat(size)),
            )
            for net, of, memory, x, mask in steps:
                net.zero_grad()
                of.backward(net.losses(x), mtu.OrthoGrad(0.3), forget={"a": mask}, memory=memory)
            assert len(ours) == len(truth)
            assert step == 0 or len(ours) == (11 if "budget" in options else 20)
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert p.grad is not None and q.grad is not None
                close(p.grad, q.grad)
