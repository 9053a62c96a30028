"""What ranks compute together, beside what one process computes on the joined batch. Run by `worker`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mtu_fast as mtu

BOUND = 1e-10
Case = Callable[[], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# ---- a model, its data ---------------------------------------------------------------------------


class Net(nn.Module):
    """Two tasks on one backbone; a convolution, a norm, a table that is the head too, and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 6)
        self.table = nn.Embedding(7, 6)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 2), "b": nn.Linear(6, 2)})

    def forward(self, x: Tensor, words: Tensor, half: bool = False) -> dict[str, Tensor]:
        h = self.norm(self.conv(x).transpose(1, 2))
        h = torch.tanh(self.linear(h)).mean(1) + self.table(words).mean(1)
        logits = h @ self.table.weight.T
        if half:  # another chain between the parameter and its use
            h = h + h[:, :4] @ self.linear.weight[:4].T @ self.linear.weight.T
        found = {task: head(h).square().sum(1) for task, head in self.heads.items()}
        return {task: loss + logits.logsumexp(1) for task, loss in found.items()}

    @property
    def shared(self) -> list[Tensor]:
        modules = (self.conv, self.norm, self.linear, self.table)
        return [p for module in modules for p in module.parameters()]


@dataclass
class Data:
    """A batch of one rank: losses of it, who is to be forgotten, who has a label."""

    x: Tensor
    words: Tensor
    forget: Tensor
    present: dict[str, Tensor]
    tasks: tuple[str, ...] = ("a", "b")
    half: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def losses(self, model: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        found = model(self.x, self.words, self.half)
        return {task: found[task] for task in self.tasks}


def batch(seed: int, n: int, **more: Any) -> Data:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 6, generator=generator, dtype=torch.float64)
    words = torch.randint(7, (n, 2), generator=generator)
    forget = torch.arange(n) % 2 == 0
    present = {"b": torch.arange(n) % 3 != 1}
    return Data(x, words, forget, present, **more)


def joined(batches: list[Data]) -> Data:
    return Data(
        torch.cat([b.x for b in batches]),
        torch.cat([b.words for b in batches]),
        torch.cat([b.forget for b in batches]),
        {"b": torch.cat([b.present["b"] for b in batches])},
    )


def per_rank(step: int = 0, sizes: tuple[int, ...] = (3, 5, 2, 4)) -> list[Data]:
    return [batch(100 * step + rank, sizes[rank]) for rank in range(dist.get_world_size())]


def mine(batches: list[Data]) -> Data:
    return batches[dist.get_rank()]


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


@dataclass
class Pair:
    """A model over the ranks, and its copy on this process alone."""

    model: Callable[..., Any]
    engine: mtu.Engine
    plain: Net
    alone: mtu.Engine
    inside: Net


def pair(wrapped: bool = False, everything: bool = False, **settings: Any) -> Pair:
    model, plain = net(), net()
    params = None if everything else model.shared
    alone = mtu.Engine(plain, None if everything else plain.shared, group=None)
    if wrapped:
        outer = nn.parallel.DistributedDataParallel(model, **settings)
        return Pair(outer, mtu.Engine(outer, params), plain, alone, model)
    group = dist.group.WORLD
    return Pair(model, mtu.Engine(model, params, group=group), plain, alone, model)


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape, (a.shape, b.shape)
    error = float((a - b).norm() / b.norm().clamp(min=1e-30)) if b.numel() else 0.0
    assert error <= BOUND, error


def same_everywhere(t: Tensor) -> None:
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t.contiguous())
    assert all(torch.equal(found[0], other) for other in found)


def same_grads(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            close(p.grad, q.grad)
            same_everywhere(p.grad)


def rows_of(engine: mtu.Engine, model: Any, data: Data, **more: Any) -> mtu.Rows:
    losses = data.losses(model)
    present = {task: mask for task, mask in data.present.items() if task in losses}
    return engine.rows(losses, forget=data.forget, present=present, **more)


def both(it: Pair, batches: list[Data], **more: Any) -> tuple[mtu.Rows, mtu.Rows]:
    ours = rows_of(it.engine, it.model, mine(batches), **more)
    return ours, rows_of(it.alone, it.plain, joined(batches), **more)


# ---- as on one process ---------------------------------------------------------------------------


def check_rows(ours: mtu.Rows, truth: mtu.Rows) -> None:
    """Everything that rows give."""
    assert len(ours) == len(truth) and ours.roles.tasks == truth.roles.tasks
    assert torch.equal(ours.roles.task, truth.roles.task)
    assert torch.equal(ours.roles.kind, truth.roles.kind)
    close(ours.roles.loss, truth.roles.loss)
    assert ours.roles.rank is not None and truth.roles.rank is None
    G = ours.gram()
    same_everywhere(G)
    close(G, truth.gram())
    for per in ("layer", "tensor"):
        close(ours.gram(per), truth.gram(per))
    w = torch.randn(len(truth), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d, wanted = ours.vjp(w), truth.vjp(w)
    for g, h in zip(d.values(), wanted.values(), strict=True):
        close(g, h)
        same_everywhere(g)
    close(ours.jvp(d), truth.jvp(wanted))
    close(ours.jvp(d, "layer"), truth.jvp(wanted, "layer"))
    assert int(ours.rank()) == int(truth.rank())


@case
def group_rows() -> None:
    ours, truth = both(pair(), per_rank())
    check_rows(ours, truth)
    counts = [int((ours.roles.rank == rank).sum()) for rank in range(dist.get_world_size())]
    own = sum(len(part) for part in ours._parts)
    assert counts[dist.get_rank()] == own


@case
def ddp_rows() -> None:
    check_rows(*both(pair(wrapped=True), per_rank()))


@case
def ddp_unused_rows() -> None:
    it = pair(wrapped=True, find_unused_parameters=True)
    for step in range(3):
        check_rows(*both(it, per_rank(step)))


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


def accumulated(it: Pair, same: Callable[[nn.Module, nn.Module], None]) -> None:
    """Steps over three micro-batches each, here and on one process."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (it.inside, it.plain)]
    for first in (0, 3, 6):
        for i in range(3):
            batches, sync = per_rank(first + i), i == 2
            ours, whole = mine(batches), joined(batches)
            for engine, model, data in ((it.engine, it.model, ours), (it.alone, it.plain, whole)):
                update = engine.accumulate(
                    data.losses(model), mtu.OrthoGrad(0.3), sync=sync, forget=data.forget, present=data.present,
                )  # fmt: skip
                assert (update is not None) == sync
        same(it.inside, it.plain)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@case
def accumulated_steps() -> None:
    for wrapped in (False, True):
        accumulated(pair(wrapped), same_grads)
    it, data = pair(), mine(per_rank())
    with raises(RuntimeError, "method of mean rows"):
        it.engine.accumulate(data.losses(it.model), mtu.PCGrad(), sync=True)
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


def step(it: Pair, batches: list[Data], method: Any, **more: Any) -> Any:
    data, whole = mine(batches), joined(batches)
    other = more.pop("plain", {})
    again = copy.deepcopy(method)  # it may have a state
    mask = {"forget": data.forget, "present": data.present}
    update = it.engine.backward(data.losses(it.model), method, **mask, **more)
    mask = {"forget": whole.forget, "present": whole.present}
    truth = it.alone.backward(whole.losses(it.plain), again, **mask, **other)
    close(update.weights, truth.weights)
    return update


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
    methods = (mtu.OrthoGrad(0.3), mtu.PCGrad(), mtu.UPGrad(), mtu.GradDiff(0.4), nabla_tau())
    kinds: tuple[Any, ...] = (torch.optim.SGD, torch.optim.AdamW)
    for i, method in enumerate(methods):
        for kind in kinds:
            it = pair(wrapped=i % 2 == 0)
            train(it, kind, method)


def nabla_tau() -> mtu.NablaTau:
    method = mtu.NablaTau()
    method.prepare(forget=10, retain=40, forget_batches=2, retain_batches=8)
    method.start_epoch(0, lambda: {"a": 9.0, "b": 9.0})
    return method


def train(it: Pair, kind: Any, method: Any, **more: Any) -> None:
    optimizers = [kind(model.parameters(), lr=1e-2) for model in (it.inside, it.plain)]
    for i in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        step(it, per_rank(i), method, **dict(more))
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(it.inside.parameters(), it.plain.parameters(), strict=True):
        close(p.detach(), q.detach())
        same_everywhere(p.detach())


@case
def interference_aware() -> None:
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        it = pair(wrapped=True)
        ours, plain = mtu.Subspace(size=12, every=2), mtu.Subspace(size=12, every=2)
        method = mtu.InterferenceAware()
        train(it, kind, method, subspace=ours, plain={"subspace": plain})
        assert len(ours) == len(plain) >= 12 and ours.full


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
        train(it, torch.optim.SGD, method, **more)
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


# ---- loud ----------------------------------------------------------------------------------------


@contextmanager
def raises(kind: type[Exception], *words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        text = str(error)
        assert all(word in text for word in words), text
    else:
        raise AssertionError(f"no {kind.__name__}")


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


# ---- sizes, groups, precisions -------------------------------------------------------------------


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
    group = dist.new_group(timeout=timedelta(seconds=3))
    if dist.get_rank() > 0:
        model = net()
        engine = mtu.Engine(model, model.shared, group=group)
        with raises(RuntimeError, "engine.rows", "did not end", "equally often"):
            rows_of(engine, model, mine(per_rank()))
    dist.barrier()
