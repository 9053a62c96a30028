"""Rows, updates and steps of several ranks are those of one process on the joined batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import mtu_fast as mtu
from tests.distributed.scene import (
    MICRO,
    accumulated,
    both,
    case,
    check_rows,
    close,
    interference_aware,
    joined,
    mine,
    net,
    pair,
    per_rank,
    raises,
    rows_of,
    same_everywhere,
    same_grads,
    same_parameters,
    step,
    ten_step_methods,
    train,
)


@case
def group_rows() -> None:
    ours, truth = both(pair(), per_rank())
    check_rows(ours, truth)
    counts = [int((ours.roles.rank == rank).sum()) for rank in range(dist.get_world_size())]
    own = sum(len(part) for part in ours._parts)
    assert counts[dist.get_rank()] == own


@case
def group_without_the_first_rank() -> None:
    """Ranks are then numbered otherwise in the group than in the world."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group(list(range(1, size)))
    if size == 2 or rank == 0:
        return
    batches = per_rank()
    model, plain = net(), net()
    engine = mtu.Engine(model, model.shared, group=group)
    alone = mtu.Engine(plain, plain.shared, group=None)
    for method in (mtu.OrthoGrad(0.3), mtu.UPGrad()):
        ours = rows_of(engine, model, batches[rank], per=method.per)
        truth = rows_of(alone, plain, joined(batches[1:]), per=method.per)
        close(ours.gram(), truth.gram())
        ours.backward(method)
        truth.backward(method)
    for p, q in zip(model.shared, plain.shared, strict=True):
        assert p.grad is not None and q.grad is not None
        close(p.grad, q.grad)
    drawn = mtu.PCGrad(generator=torch.Generator().manual_seed(rank))
    rows = rows_of(engine, model, batches[rank])
    first = torch.Generator().manual_seed(1)
    weights = mtu.PCGrad(generator=first)(rows.gram(), rows.roles)
    close(rows.backward(drawn, check=False).weights, weights)


@case
def ddp_rows() -> None:
    check_rows(*both(pair(wrapped=True), per_rank()))


@case
def ddp_unused_rows() -> None:
    it = pair(wrapped=True, find_unused_parameters=True)
    for i in range(3):
        check_rows(*both(it, per_rank(i)))


@case
def all_parameters() -> None:
    check_rows(*both(pair(everything=True), per_rank()))


@case
def task_rows() -> None:
    check_rows(*both(pair(), per_rank(), per="task"))


@case
def empty_batch() -> None:
    for sizes in ((0, 3, 2, 1), (3, 0, 0, 0)):
        check_rows(*both(pair(), per_rank(sizes=sizes)))
        check_rows(*both(pair(), per_rank(sizes=sizes), per="task"))


@case
def no_sample_anywhere() -> None:
    ours, truth = both(pair(), per_rank(sizes=(0, 0, 0, 0)))
    assert len(ours) == len(truth) == 0 and ours.gram().shape == (0, 0)
    ours, _ = both(pair(), per_rank(sizes=(0, 0, 0, 0)), per="task")
    assert len(ours) == 0


@case
def tasks_of_some_ranks() -> None:
    """Rank 0 has task a, the others both; the joined batch says so by `present`."""
    for per in ("sample", "task"):
        it, batches = pair(), per_rank()
        batches[0].tasks = ("a",)
        whole = joined(batches)
        whole.present["b"][: len(batches[0].forget)] = False
        ours = rows_of(it.engine, it.model, mine(batches), per=per)
        check_rows(ours, rows_of(it.alone, it.plain, whole, per=per))


@case
def unequal_graphs() -> None:
    """A use behind a view on one rank only: it meets the others' as explicit rows."""
    it, batches = pair(), per_rank()
    batches[-1].half = True
    ours = rows_of(it.engine, it.model, mine(batches))
    alone = [rows_of(it.alone, it.plain, b) for b in batches]
    truth = mtu.cat(*alone)
    order = []  # task-major, as the joined rows
    for task in range(2):
        order += [r for r in range(len(truth)) if int(truth.roles.task[r]) == task]
    close(ours.gram(), truth.gram()[order][:, order])


@case
def accumulation() -> None:
    it, calls = pair(), [per_rank(step) for step in range(3)]
    ours = mtu.cat(*(rows_of(it.engine, it.model, mine(batches)) for batches in calls))
    truth = mtu.cat(*(rows_of(it.alone, it.plain, joined(batches)) for batches in calls))
    check_rows(ours, truth)


ACCUMULATED = (mtu.OrthoGrad(0.3), mtu.PCGrad(), mtu.MUNBa(), mtu.GradVac(), mtu.GradDiff(0.4))


@case
def accumulated_steps() -> None:
    for wrapped in (False, True):
        for method in ACCUMULATED:
            accumulated(pair(wrapped), same_grads, method)
    accumulated(pair(wrapped=False, everything=True), same_grads, mtu.PCGrad())


@case
def a_fault_among_micro_batches() -> None:
    """What one rank finds all raise, and what was held before stays."""
    it, batches = pair(), [per_rank(1), per_rank(2, MICRO[1])]

    def accumulate(i: int, sync: bool, spoil: bool = False) -> None:
        data = mine(batches[i])
        losses = data.losses(it.model)
        if spoil and dist.get_rank() == 1:
            losses["a"] = losses["a"].sum()
        mask = {"forget": data.forget, "present": data.present}
        it.engine.accumulate(losses, mtu.PCGrad(), sync=sync, **mask)

    accumulate(0, sync=False)
    with raises(ValueError, "rank 1:", "already reduced"):
        accumulate(1, sync=False, spoil=True)
    accumulate(1, sync=True)
    for i, whole in enumerate(map(joined, batches)):
        mask = {"forget": whole.forget, "present": whole.present}
        it.alone.accumulate(whole.losses(it.plain), mtu.PCGrad(), sync=i == 1, **mask)
    same_grads(it.inside, it.plain)
    it.inside.zero_grad()
    accumulate(0, sync=False)
    if dist.get_rank() == 1:
        with torch.no_grad():
            it.inside.conv.bias.add_(1)
    with raises(RuntimeError, "rank 1:", "changed in place"):
        accumulate(1, sync=True)
    assert all(p.grad is None for p in it.inside.parameters())


@case
def backward_leaves_the_same() -> None:
    for method in (mtu.OrthoGrad(0.3), mtu.OrthoGrad(0.3, "layer"), mtu.Mean(), mtu.PCGrad(),
                   mtu.UPGrad(), mtu.GradDiff(0.4), mtu.GradVac()):  # fmt: skip
        for wrapped in (False, True):
            it, batches = pair(wrapped), per_rank()
            update = step(it, batches, method)
            assert update is not None
            same_grads(it.inside, it.plain)


@case
def weights_of_ones_own() -> None:
    it, batches = pair(everything=True), per_rank()
    ours, truth = both(it, batches)
    w = torch.linspace(-1, 1, len(truth), dtype=torch.float64)
    ours.backward(w)
    truth.backward(w)
    same_grads(it.inside, it.plain)


@case
def ten_steps() -> None:
    for i, method, kind in ten_step_methods(0):
        train(pair(wrapped=i % 2 == 0), kind, method, same_parameters)


@case
def ddp_interference_aware() -> None:
    interference_aware(pair(wrapped=True), torch.optim.SGD, same_parameters)


@case
def random_orders() -> None:
    """Generators that differ: all draw what rank 0 draws."""
    it, batches = pair(), per_rank()
    generator = torch.Generator().manual_seed(dist.get_rank())
    ours, truth = both(it, batches)
    ours.backward(mtu.PCGrad(generator), check=False)
    truth.backward(mtu.PCGrad(torch.Generator().manual_seed(0)), check=False)
    same_grads(it.inside, it.plain)


@case
def kept_rows() -> None:
    """State of a subspace: each rank its own rows, and again."""
    it = pair()
    ours = mtu.Subspace(size=4, every=1)
    for i in range(3):
        ours.keep(rows_of(it.engine, it.model, mine(per_rank(i))))
    before = ours.join(rows_of(it.engine, it.model, mine(per_rank(5)))).gram()
    again = mtu.Subspace(size=4, every=1)
    again.load_state_dict(ours.state_dict(), it.engine.subspace_rows)
    G = ours.join(rows_of(it.engine, it.model, mine(per_rank(5)))).gram()
    close(again.join(rows_of(it.engine, it.model, mine(per_rank(5)))).gram(), G)
    # explicit rows are laid rank after rank, whatever their tasks: the same ones in another order
    close(torch.linalg.eigvalsh(G), torch.linalg.eigvalsh(before))
    assert len(again) == len(ours)


@case
def kept_constraints() -> None:
    """Retain rows of earlier steps: each rank keeps its own, and all are constraints of every step."""
    kinds: tuple[tuple[dict[str, Any], mtu.Method], ...] = (
        ({"size": 9}, mtu.OrthoGrad(0.3)),
        ({"size": 6, "keep": "conflicting"}, mtu.OrthoGrad(0.3, "layer")),
        ({"size": 6, "per_task": True, "dtype": torch.float64}, mtu.OrthoGrad(0.3, "tensor")),
        ({"size": 7, "tasks": ["a"]}, mtu.InterferenceAware()),
        ({"budget": 20 * 1500}, mtu.LevelledOrthoGrad()),
    )
    # all with two ranks
    for memory, method in kinds if dist.get_world_size() == 2 else kinds[:2]:
        it = pair(wrapped=True)
        ours, plain = mtu.Memory(**memory), mtu.Memory(**memory)
        more: dict[str, Any] = {"memory": ours, "plain": {"memory": plain}}
        if method.needs_subspace:
            of = {"size": 8, "every": 2}
            more["subspace"] = mtu.Subspace(**of)
            more["plain"]["subspace"] = mtu.Subspace(**of)
        train(it, torch.optim.SGD, method, same_parameters, **more)
        assert len(ours) == len(plain) > 3
        block: Any = ours.held.block
        own = sum(len(part) for part in block.parts)
        assert len(block.roles.rank.unique()) > 1
        assert own == int((block.roles.rank == dist.get_rank()).sum())


@case
def kept_constraints_again() -> None:
    """State of a memory: each rank its own rows; a state of one process is told."""
    it = pair()
    ours, again = mtu.Memory(8), mtu.Memory(8)
    for i in range(5):
        ours.step(rows_of(it.engine, it.model, mine(per_rank(i))), mtu.OrthoGrad(0.3))
    before = ours.join(rows_of(it.engine, it.model, mine(per_rank(5)))).gram()
    again.load_state_dict(ours.state_dict(), it.engine.subspace_rows)
    after = again.join(rows_of(it.engine, it.model, mine(per_rank(5)))).gram()
    close(after, before)
    assert len(again) == len(ours) == 8
    held: tuple[Any, Any] = again.held.block, ours.held.block
    assert torch.equal(held[0].roles.sample, held[1].roles.sample)
    alone = mtu.Memory(8)
    alone.step(rows_of(it.alone, it.plain, joined(per_rank(0))), mtu.OrthoGrad(0.3))
    with raises(ValueError, "rows of one process"):
        again.load_state_dict(alone.state_dict(), it.engine.subspace_rows)
    with raises(ValueError, "one of several ranks"):
        alone.load_state_dict(ours.state_dict(), it.alone.subspace_rows)
    basis = mtu.Memory(8, basis=True)
    with raises(ValueError, "basis=False"):
        basis.step(rows_of(it.engine, it.model, mine(per_rank(5))), mtu.OrthoGrad(0.3))
    with raises(ValueError, "basis=False"):
        basis.load_state_dict(ours.state_dict(), it.engine.subspace_rows)


@case
def ordinary_backward_goes_on() -> None:
    """DDP's own reduction runs in an ordinary step between two of ours, and not in ours."""
    it = pair(wrapped=True, everything=True)
    for i in range(2):
        step(it, per_rank(i), mtu.OrthoGrad(0.3))
        for model in (it.inside, it.plain):
            model.zero_grad()
        data = mine(per_rank(7, sizes=(4, 4, 4, 4)))
        sum(loss.mean() for loss in data.losses(it.model).values()).backward()
        for p in it.inside.parameters():
            same_everywhere(p.grad)
        whole = joined(per_rank(7, sizes=(4, 4, 4, 4)))
        sum(loss.mean() for loss in whole.losses(it.plain).values()).backward()
        same_grads(it.inside, it.plain)
