"""Tensor parallel models beside the same model on one process: one batch on all ranks. Run by `worker`."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import mtu_fast as mtu
from tests.distributed import running
from tests.distributed.running import folder
from tests.distributed.scene import case, close, nabla_tau, raises, same_everywhere
from tests.distributed.sharded import check_rows, whole


class Layers(nn.Module):
    """Two tasks; products cut along either side, a norm, and heads outside `params`; 2, 3 and 4 ranks divide all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 12), "b": nn.Linear(6, 2)})

    def forward(self, words: Tensor) -> dict[str, Tensor]:
        h = self.norm(self.table(words))
        h = (h + self.down(torch.tanh(self.up(h)))).mean(1)
        return {task: head(h).square().sum(1) for task, head in self.heads.items()}

    @property
    def shared(self) -> list[Tensor]:
        modules = (self.table, self.norm, self.up, self.down)
        return [p for module in modules for p in module.parameters()]


def layers() -> Layers:
    torch.manual_seed(5)
    return Layers().double()


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Both:
    """A model over the ranks, and its copy on this process alone."""

    def __init__(self, everything: bool = False, **plan: Any) -> None:
        self.model, self.plain = layers(), layers()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(self.model, mesh, PLAN | plan)
        params = (None, None) if everything else (self.model.shared, self.plain.shared)
        self.engine = mtu.Engine(self.model, params[0])
        self.alone = mtu.Engine(self.plain, params[1], group=None)

    def rows(self, seed: int, **more: Any) -> tuple[mtu.Rows, mtu.Rows]:
        words, mask = data(seed)
        present = {"b": torch.arange(5) != 2}
        ours = self.engine.rows(self.model(words), forget=mask, present=present, **more)
        return ours, self.alone.rows(self.plain(words), forget=mask, present=present, **more)

    def step(self, seed: int, method: Any, **more: Any) -> None:
        words, mask = data(seed)
        other = more.pop("plain", {})
        again = copy.deepcopy(method)
        update = self.engine.backward(self.model(words), method, forget=mask, **more)
        truth = self.alone.backward(self.plain(words), again, forget=mask, **other)
        close(update.weights, truth.weights)


def data(seed: int) -> tuple[Tensor, Tensor]:
    words = torch.randint(12, (5, 3), generator=torch.Generator().manual_seed(seed))
    return words, torch.arange(5) % 2 == 0


def same(one: nn.Module, other: nn.Module, grads: bool = True) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        a, b = (p.grad, q.grad) if grads else (p.detach(), q.detach())
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert isinstance(a, DTensor) == isinstance(p.data, DTensor), name
            close(a.full_tensor() if isinstance(a, DTensor) else a, b)


@case
def tp_rows() -> None:
    it = Both()
    for i in range(3):
        check_rows(*it.rows(i))
    check_rows(*Both(everything=True).rows(7))


@case
def tp_of_every_kind() -> None:
    """A table cut by words; a head whose output is gathered."""
    more = {"table": RowwiseParallel(input_layouts=Replicate())}
    for plan in (more, {"heads.a": ColwiseParallel(output_layouts=Replicate())}):
        check_rows(*Both(**plan).rows(1))


@case
def tp_mean_rows() -> None:
    it = Both()
    for i in range(2):
        check_rows(*it.rows(i, per="task"))


@case
def tp_one_backward_leaves_the_same() -> None:
    for method in (mtu.OrthoGrad(0.3), mtu.OrthoGrad(0.3, "layer"), mtu.Mean(), mtu.PCGrad(),
                   mtu.UPGrad(), mtu.GradDiff(0.4), mtu.GradVac()):  # fmt: skip
        it = Both()
        it.step(1, method)
        same(it.model, it.plain)


@case
def tp_ten_steps() -> None:
    methods = (mtu.OrthoGrad(0.3), mtu.PCGrad(), mtu.UPGrad(), mtu.GradDiff(0.4), nabla_tau())
    for i, method in enumerate(methods):
        train(Both(), (torch.optim.SGD, torch.optim.AdamW)[i % 2], method)
    ours, plain = mtu.Subspace(size=8, every=2), mtu.Subspace(size=8, every=2)
    method = mtu.InterferenceAware()
    train(Both(), torch.optim.AdamW, method, subspace=ours, plain={"subspace": plain})
    assert len(ours) == len(plain) >= 8


@case
def tp_kept_constraints() -> None:
    ours, plain = mtu.Memory(9), mtu.Memory(9)
    it = Both()
    train(it, torch.optim.SGD, mtu.OrthoGrad(0.3), memory=ours, plain={"memory": plain})
    assert len(ours) == len(plain) == 9
    again = mtu.Memory(9)
    again.load_state_dict(ours.state_dict(), it.engine.subspace_rows)
    wanted, found = (memory.held.rows.vectors() for memory in (plain, again))
    assert wanted.keys() == found.keys()
    for name, t in wanted.items():
        close(found[name], t)
    it.model.zero_grad()
    it.plain.zero_grad()
    it.step(11, mtu.OrthoGrad(0.3), memory=again, plain={"memory": plain})
    same(it.model, it.plain)
    with raises(ValueError, "basis=False"):
        it.step(0, mtu.OrthoGrad(0.3), memory=mtu.Memory(9, basis=True))


@case
def tp_vectors_that_are_given() -> None:
    """Each rank takes its slices of them; kept rows are given back whole."""
    it, other = Both(), Both()
    for seed in range(3):
        ours, plain = it.rows(seed)
        kept, held = ours.to_subspace(), plain.to_subspace()
        for name, t in held.vectors().items():
            close(kept.vectors()[name], t)
        vectors = held.vectors()
        again = other.engine.subspace_rows(vectors, "a"), other.alone.subspace_rows(vectors, "a")
        check_rows(*again)
        check_rows(*(mtu.cat(*pair) for pair in zip(other.rows(seed + 1), again, strict=True)))
    wrong = {name: t[:, :1] for name, t in vectors.items()}
    with raises(ValueError, "rank 0", "expected [K, *"):
        other.engine.subspace_rows(wrong, "a")


@case
def tp_accumulated_steps() -> None:
    for method in (mtu.OrthoGrad(0.3), mtu.PCGrad()):
        it = Both()
        for seed in range(6):
            words, mask = data(seed)
            words, mask = words[seed % 2 :], mask[seed % 2 :]
            for engine, model in ((it.engine, it.model), (it.alone, it.plain)):
                sync = seed % 3 == 2
                engine.accumulate(model(words), method, sync=sync, forget=mask)
            same(it.model, it.plain)
            if sync:
                it.model.zero_grad()
                it.plain.zero_grad()


def train(it: Both, kind: Any, method: Any, **more: Any) -> None:
    optimizers = [
        kind(model.parameters(), lr=1e-2, foreach=False) for model in (it.model, it.plain)
    ]
    for i in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        it.step(i, method, **dict(more))
        for optimizer in optimizers:
            optimizer.step()
    same(it.model, it.plain, grads=False)
    for p in it.model.parameters():
        if not isinstance(p.data, DTensor):
            same_everywhere(p.detach())


@case
def tp_an_error_of_other_batches() -> None:
    it = Both()
    words, _ = data(dist.get_rank())
    mesh_free = layers()  # a forward of the model itself would wait for equal shapes
    losses = mesh_free(words[: 5 - dist.get_rank()])
    with raises(ValueError, "same batch"):
        it.engine.rows(losses)


@case
def tp_refusals() -> None:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    model = layers()
    parallelize_module(model, mesh, PLAN)
    with raises(ValueError, "Leave group= out"):
        mtu.Engine(model, group=None)
    two = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
    both = layers()
    parallelize_module(both, two["tp"], PLAN)
    for module in (both.up, both.down):
        fully_shard(module, mesh=two["dp"])
    with raises(ValueError, "tensor parallel"):
        mtu.Engine(both)
    wide = nn.Linear(4, 4)
    wide.weight = nn.Parameter(distribute_tensor(wide.weight.detach(), two, [Replicate()] * 2))
    with raises(ValueError, "one mesh of one dimension"):
        mtu.Engine(wide)
    if size == 4:
        part = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        beside = layers()
        parallelize_module(beside, part["tp"], PLAN)
        with raises(ValueError, "2 of 4 ranks"):
            mtu.Engine(beside)


@case
def tp_audit_as_on_one_process() -> None:
    """Cosines, relearning and all else; beside a plain original and one in slices."""
    loaders = {name: batches_of(i) for i, name in enumerate(("forget", "retain", "test"))}

    def losses(model: nn.Module, batch: Any) -> Any:
        return model(batch[0])

    def score(model: nn.Module, batches: Any) -> dict[str, float]:
        found = [losses(model, batch) for batch in batches]
        return {task: -float(torch.cat([f[task] for f in found]).mean()) for task in found[0]}

    more: dict[str, Any] = {"losses": losses, "score": score, "cosine_samples": 2, **loaders}
    more |= {"relearn": partial(torch.optim.SGD, lr=0.1, foreach=False), "relearn_limit": 2}
    plain = unlearned_a_little(layers())
    truth = mtu.audit(layers(), plain, **more)
    for original in (layers(), cut()):
        model = unlearned_a_little(cut())
        before = [whole(p.detach()) for p in model.parameters()]
        ours = mtu.audit(original, model, **more)
        for part in ("scores", "membership", "drift", "request", "parameter_shift", "relearn"):
            running.near(ours.data[part], truth.data[part])
        running.near(ours.data["cosines"], truth.data["cosines"])
        for p, was in zip(model.parameters(), before, strict=True):
            assert p.grad is None and torch.equal(whole(p.detach()), was)
    # a rank of DDP or of one process would read batches of its own
    with raises(ValueError, "original", "tensor parallel"):
        mtu.audit(cut(), plain, **more)
    with raises(ValueError, "original", "an FSDP2 model beside a tensor parallel"):
        mtu.audit(fully_shard(layers()), unlearned_a_little(cut()), **more)


def unlearned_a_little(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    return model


def batches_of(seed: int) -> list[Any]:
    return [(data(10 * seed + i)[0][:3],) for i in range(3)]


def unlearned(model: Layers, steps: int, **more: Any) -> mtu.History:
    """A run, of which all ranks read the same batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is synchronised, of a model on one process
        return mtu.unlearn(
            model,
            optimizer,
            forget=batches_of(1),
            retain=batches_of(2),
            validation=batches_of(3),
            losses=lambda model, batch: model(batch[0]),
            params=model.shared,
            max_steps=steps,
            every=3,
            max_drift=9.0,
            clip=5.0,
            progress=False,
            **({"method": mtu.OrthoGrad(0.5)} | more),
        )


def cut() -> Layers:
    model = layers()
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), PLAN)
    return model


@case
def tp_unlearn_as_on_one_process() -> None:
    """The loop, and its checkpoint in pieces: as many ranks go on to the same bits, and one process from them all."""
    path, straight, plain = folder() / "run.pt", cut(), layers()
    histories = [unlearned(model, 5) for model in (straight, plain)]
    same(straight, plain, grads=False)
    running.same_run(*histories)
    unlearned(cut(), 3, checkpoint=path)
    pieces = list(path.parent.glob("run.pt.*of*"))
    assert len(pieces) == dist.get_world_size()
    alone = folder()
    if dist.get_rank() == 0:
        for file in (path, *pieces):
            (alone / file.name).write_bytes(file.read_bytes())
    dist.barrier()
    again = cut()
    running.same_run(unlearned(again, 5, checkpoint=path), histories[0])
    for p, q in zip(again.parameters(), straight.parameters(), strict=True):
        assert torch.equal(whole(p.detach()), whole(q.detach()))
    if dist.get_rank() == 0:
        again = layers()
        running.same_run(unlearned(again, 5, checkpoint=alone / path.name), histories[1])
        for p, q in zip(again.parameters(), plain.parameters(), strict=True):
            close(p.detach(), q.detach())
    dist.barrier()


@case
def tp_unlearn_with_kept_rows() -> None:
    """What slices of kept rows were written, one process goes on from, and the other way round."""

    def kept() -> dict[str, Any]:
        held = {"subspace": mtu.Subspace(size=6, every=2), "memory": mtu.Memory(7)}
        return {"method": mtu.InterferenceAware(), **held}

    straight, plain, own = cut(), layers(), folder()
    unlearned(straight, 7, **kept())
    history = unlearned(plain, 7, **kept())
    same(straight, plain, grads=False)
    unlearned(cut(), 3, checkpoint=own / "slices.pt", **kept())
    if dist.get_rank() == 0:
        unlearned(layers(), 3, checkpoint=own / "alone.pt", **kept())
        (own / "copies").mkdir()
        for file in own.glob("slices.pt*"):
            (own / "copies" / file.name).write_bytes(file.read_bytes())
    dist.barrier()
    for name in ("slices.pt", "alone.pt"):
        again = cut()
        running.same_run(unlearned(again, 7, checkpoint=own / name, **kept()), history)
        for p, q in zip(again.parameters(), straight.parameters(), strict=True):
            close(whole(p.detach()), whole(q.detach()))
            assert name == "alone.pt" or torch.equal(whole(p.detach()), whole(q.detach()))
    if dist.get_rank() == 0:
        alone = layers()
        unlearned(alone, 7, checkpoint=own / "copies" / "slices.pt", **kept())
        for p, q in zip(alone.parameters(), plain.parameters(), strict=True):
            close(p.detach(), q.detach())
    dist.barrier()


@case
def tp_unlearn_of_other_batches_is_refused() -> None:
    model, rank = cut(), dist.get_rank()
    batches = batches_of(1)[: 2 + rank]
    with raises(ValueError, "forget", "one sampler"):
        mtu.unlearn(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, foreach=False),
            forget=batches,
            retain=batches_of(2),
            losses=lambda model, batch: model(batch[0]),
            method=mtu.OrthoGrad(),
            max_steps=1,
            progress=False,
        )
