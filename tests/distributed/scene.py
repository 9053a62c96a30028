"""A model over ranks and its copy on one process, their batches, and what is compared; cases are registered here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mtu_fast as mtu

BOUND = 1e-10
Case = Callable[[], None]
Same = Callable[[nn.Module, nn.Module], None]
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


def same_parameters(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        close(p.detach(), q.detach())
        same_everywhere(p.detach())


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


# of the ranks in three micro-batches: unequal, and with a rank that has no sample
MICRO = ((3, 5, 2, 4), (4, 0, 3, 1), (1, 2, 5, 3))


def accumulated(it: Pair, same: Same, method: Any) -> None:
    """Steps over three micro-batches each, here and on one process."""
    methods = method, copy.deepcopy(method)  # it may have a state
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (it.inside, it.plain)]
    for first in (0, 3):
        for i, sizes in enumerate(MICRO):
            batches, sync = per_rank(first + i, sizes), i == 2
            ours, whole = mine(batches), joined(batches)
            updates = []
            both = (it.engine, it.model, ours), (it.alone, it.plain, whole)
            for each, (engine, model, data) in zip(methods, both, strict=True):
                masks = {"forget": data.forget, "present": data.present}
                update = engine.accumulate(data.losses(model), each, sync=sync, **masks)
                updates.append(update)
            if not sync:
                assert updates == [None, None]
                continue
            close(updates[0].weights, updates[1].weights)
            close(updates[0].roles.loss, updates[1].roles.loss)
        same(it.inside, it.plain)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


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


def nabla_tau() -> mtu.NablaTau:
    method = mtu.NablaTau()
    method.prepare(forget=10, retain=40, forget_batches=2, retain_batches=8)
    method.start_epoch(0, lambda: {"a": 9.0, "b": 9.0})
    return method


OPTIMIZERS: tuple[Any, ...] = (torch.optim.SGD, torch.optim.AdamW)


def ten_step_methods(first: int) -> Iterator[tuple[int, mtu.Method, Any]]:
    """(a number, method, optimizer): each method, and in turn the optimizers, of which `first` is the first one's."""
    methods = (mtu.OrthoGrad(0.3), mtu.PCGrad(), mtu.UPGrad(), mtu.GradDiff(0.4), nabla_tau())
    for i, method in enumerate(methods):
        yield i, method, OPTIMIZERS[(first + i) % 2]


def train(it: Pair, kind: Any, method: Any, same: Same, **more: Any) -> None:
    """Ten steps here and on one process, to the same parameters."""
    optimizers = [kind(model.parameters(), lr=1e-2) for model in (it.inside, it.plain)]
    for i in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        step(it, per_rank(i), method, **dict(more))
        for optimizer in optimizers:
            optimizer.step()
    same(it.inside, it.plain)


def interference_aware(it: Pair, kind: Any, same: Same) -> None:
    """Ten steps beside a subspace of earlier rows."""
    ours, plain = mtu.Subspace(size=12, every=2), mtu.Subspace(size=12, every=2)
    more = {"subspace": ours, "plain": {"subspace": plain}}
    train(it, kind, mtu.InterferenceAware(), same, **more)
    assert len(ours) == len(plain) >= 12 and ours.full


@contextmanager
def raises(kind: type[Exception], *words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        text = str(error)
        assert all(word in text for word in words), text
    else:
        raise AssertionError(f"no {kind.__name__}")
