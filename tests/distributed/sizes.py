"""Many rounds, some of the ranks, lower precisions, and a rank that does not come."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

import mtu_fast as mtu
from tests.distributed.scene import (
    batch,
    both,
    case,
    check_rows,
    close,
    joined,
    mine,
    net,
    pair,
    per_rank,
    raises,
    rows_of,
    same_everywhere,
)


@case
def many_rounds() -> None:
    """A parameter at a time, and sums of few numbers, give the same."""
    from mtu_fast._distributed import gram, sums

    before = gram.ROUND, sums.BUCKET, gram.HELD
    gram.ROUND, sums.BUCKET = 64, 8
    try:
        check_rows(*both(pair(), per_rank()))
        gram.HELD = 64  # factors go around in a ring
        check_rows(*both(pair(), per_rank()))
        check_rows(*both(pair(), per_rank(sizes=(0, 3, 2, 1))))
    finally:
        gram.ROUND, sums.BUCKET, gram.HELD = before


@case
def some_of_the_ranks() -> None:
    """A group of the last two ranks: their numbers within the group are not those of the processes."""
    last = [dist.get_world_size() - 2, dist.get_world_size() - 1]
    group = dist.new_group(last)
    if dist.get_rank() not in last:
        return
    rank = last.index(dist.get_rank())
    model, plain = net(), net()
    engine = mtu.Engine(model, model.shared, group=group)
    alone = mtu.Engine(plain, plain.shared, group=None)
    batches = [batch(5, 3), batch(6, 2)]
    for per in ("sample", "task"):
        ours = rows_of(engine, model, batches[rank], per=per)
        truth = rows_of(alone, plain, joined(batches), per=per)
        close(ours.gram(), truth.gram())
        w = torch.ones(len(truth), dtype=torch.float64)
        for g, h in zip(ours.vjp(w).values(), truth.vjp(w).values(), strict=True):
            close(g, h)


@case
def lower_precision() -> None:
    """Sums over ranks come before rounding to the parameters' dtype."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        model = net().to(dtype)
        engine = mtu.Engine(model, model.shared, group=dist.group.WORLD)
        alone = mtu.Engine(model, model.shared, group=None)
        batches = per_rank()
        for data in batches:
            data.x = data.x.to(dtype)
        ours = rows_of(engine, model, mine(batches))
        truth = rows_of(alone, model, joined(batches))
        G, wanted = ours.gram(), truth.gram()
        assert float((G - wanted).norm() / wanted.norm()) < bound
        w = torch.ones(len(truth), dtype=torch.float64)
        for g, h in zip(ours.vjp(w).values(), truth.vjp(w).values(), strict=True):
            assert g.dtype == h.dtype == dtype
            assert float((g - h).norm()) <= bound * float(h.norm())
            same_everywhere(g.float())


@case
def bfloat16_on_the_wire() -> None:
    """Half the bytes; G is that of rounded rows, the same bits everywhere, and what is left is measured."""
    data = mine(per_rank())
    data.x = data.x.float()
    sent, grams, cosines = [], [], []
    for wire in (None, torch.bfloat16):
        model = net().float()
        engine = mtu.Engine(model, model.shared, group=dist.group.WORLD, wire=wire)
        rows = rows_of(engine, model, data)
        grams.append(rows.gram())
        same_everywhere(grams[-1])
        ranks = engine._taking.ranks
        assert ranks is not None
        sent.append(ranks.sent["rows.gram: uses"])
        length = grams[0].diagonal().sqrt()
        update = rows.backward(mtu.OrthoGrad(0.0), check=False)
        constraint = mtu.OrthoGrad(0.0).constraint(grams[0], update.roles, update.weights)
        assert constraint is not None
        left = (grams[0] @ update.weights.double()).abs()[constraint.active]
        size = (update.weights @ grams[0] @ update.weights).sqrt()
        cosines.append(float((left / length[constraint.active] / size).max()))
    length = grams[0].diagonal().sqrt()
    error = float(((grams[1] - grams[0]).abs() / length[:, None] / length).max())
    assert 0 < error <= 2.0**-7
    assert cosines[0] < 1e-4 and cosines[1] < 0.2
    heads = 2048 * len(model.shared)  # of the parcels, which are small here
    assert sent[1] < sent[0] and sent[1] <= sent[0] / 2 + heads
    with raises(ValueError, "expected torch.bfloat16"):
        mtu.Engine(net(), group=None, wire=torch.float16)


@case
def a_rank_that_does_not_come() -> None:
    """The others do not wait longer than the group's timeout, and are told in which exchange."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    if dist.get_rank() > 0:
        model = net()
        engine = mtu.Engine(model, model.shared, group=group)
        with raises(RuntimeError, "engine.rows", "did not end", "equally often"):
            rows_of(engine, model, mine(per_rank()))
    dist.barrier()
