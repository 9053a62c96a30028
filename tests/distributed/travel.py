"""What ranks send one another, and what a rank holds meanwhile."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mtu_fast as mtu
from tests.distributed.scene import (
    case,
    mine,
    net,
    pair,
    per_rank,
    raises,
    rows_of,
    same_grads,
    step,
)


@case
def bytes_are_counted() -> None:
    """Every use is sent at most once, by a rank that does not multiply it."""
    it, batches = pair(), per_rank()
    ours = rows_of(it.engine, it.model, mine(batches))
    held = sum(use.held for part in ours._parts for use in part.uses.values())
    ranks = it.engine._taking.ranks
    assert ranks is not None
    ours.gram()
    head = 4096 * len(it.inside.shared)
    sent = torch.tensor([ranks.sent["rows.gram: uses"], held])
    assert 0 < int(sent[0]) <= held + head
    total = sent.clone()
    dist.all_reduce(total)
    R = len(ours)
    W = dist.get_world_size()
    assert ranks.sent["rows.gram: sum"] == 2 * (W - 1) * 8 * (R * R + 1) // W


def chain(samples: int) -> tuple[mtu.Rows, int]:
    """Rows of four linear layers over positions, and the bytes that a rank holds of them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    engine = mtu.Engine(model, group=dist.group.WORLD)
    x = torch.randn(samples, 8, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
    rows = engine.rows(model(x).square().mean((1, 2)))
    return rows, sum(use.held for part in rows._parts for use in part.uses.values())


@case
def bytes_are_those_of_the_model() -> None:
    """Uses of a rank travel once, unless they are multiplied there: (W - 1) / W of them on average."""
    size, samples = dist.get_world_size(), 16
    rows, held = chain(samples)
    assert held == 4 * samples * 8 * (64 + 64) * 4  # factors: S (I + O) numbers a sample and layer
    rows.gram()
    ranks = rows._products.ranks
    assert ranks is not None
    sent = torch.tensor(ranks.sent["rows.gram: uses"], dtype=torch.float64)
    dist.all_reduce(sent)
    model = held * (size - 1) / size
    assert abs(float(sent) / size - model) <= 0.1 * model


@case
def memory_is_flat_in_ranks() -> None:
    """What a rank takes in at a time is what it holds itself, or one peer's, however many ranks there are."""
    from mtu_fast._distributed import gram

    before = gram.ROUND, gram.HELD
    try:
        for dense, (round_, held_) in ((True, (1 << 10, before[1])), (False, (1 << 10, 1 << 10))):
            rows, _ = chain(16)
            if dense:  # explicit rows: cut by columns
                for part in rows._parts:
                    part.uses = {j: use.grounded() for j, use in part.uses.items()}
                    part.versions = part.versions[0], tuple(0 for _ in part.uses)
            largest = max(use.held for part in rows._parts for use in part.uses.values())
            gram.ROUND, gram.HELD = round_, held_
            ranks: Any = rows._products.ranks
            most, exchanged = [0], ranks.exchanged

            def counted(what: str, pieces: Any, sizes: Any, device: Any) -> Any:
                most.append(sum(sizes))  # noqa: B023
                return exchanged(what, pieces, sizes, device)  # noqa: B023

            ranks.exchanged = counted
            rows.gram()
            taken = torch.tensor(max(most))
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            assert 0 < int(taken) <= 1.1 * largest
    finally:
        gram.ROUND, gram.HELD = before


@case
def rows_to_forget_travel_as_sums() -> None:
    """A method that sees their means alone: fewer bytes, and the same step."""
    for method in (mtu.OrthoGrad(0.3), mtu.OrthoGrad(0.3, "layer")):
        sent = []
        for pools in (True, False):
            it, batches = pair(), per_rank(3, sizes=(24, 6, 0, 12))
            for data in batches:
                data.forget = torch.arange(len(data.forget)) % 4 != 0
            if dist.get_world_size() > 2:  # not every rank has some of each task
                batches[1].forget[:] = False
            if pools:
                update = step(it, batches, method)
                assert update.into is not None and len(update.seen) < len(update.roles)
            else:
                rows_of(it.engine, it.model, mine(batches)).backward(method, check=False)
                rows_of(it.engine, it.model, mine(batches)).gram()
            ranks = it.engine._taking.ranks
            assert ranks is not None
            sent.append(torch.tensor(ranks.sent["rows.gram: uses"]))
            if pools:
                same_grads(it.inside, it.plain)
            else:
                sent[-1] -= sent[0]  # of the step, of which only the Gram of all rows is to be left
        for count in sent:
            dist.all_reduce(count)
        assert 0 < int(sent[0]) < 0.7 * int(sent[1])


@case
def rows_of_this_rank() -> None:
    model = net()
    engine = mtu.Engine(model, group=None)
    data = mine(per_rank())
    rows = rows_of(engine, model, data)
    assert rows.roles.rank is None
    assert len(rows) == len(data.forget) + int(data.present["b"].sum())


@case
def one_rank_alone_is_no_group() -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    own = groups[dist.get_rank()]
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = mtu.Engine(model, group=own)
    assert rows_of(engine, model, mine(per_rank())).roles.rank is None
    other = groups[1 - min(dist.get_rank(), 1)]
    with raises(ValueError, "is not part of"):
        mtu.Engine(model, group=other)
