"""`unlearn` and `audit` on several ranks beside one process with the ranks' batches together. Run by `worker`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import mtu_fast as mtu
from mtu_fast._distributed.crew import RankedCrew
from mtu_fast._distributed.wrappers import parallel
from mtu_fast.unlearning.loop import DivergedError
from mtu_fast.unlearning.metrics import relearn_steps
from mtu_fast.unlearning.report.passes import Reading
from mtu_fast.unlearning.report.relearning import relearn
from tests.distributed.scene import case, close, raises, same_everywhere
from tests.distributed.sharded import whole

Batch = Sequence[Tensor]
SIZE = 24  # samples that 2, 3 and 4 ranks can share


def data(seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZE, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (SIZE,), generator=generator)
    return TensorDataset(x, y)


def model_of() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def losses(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def accuracy(model: nn.Module, loader: Any) -> dict[str, float]:
    right = [(model(x).argmax(1) == y).double() for x, y in loader]
    return {"loss": float(torch.cat(right).mean())}


def shares(seed: int, group: Any = None) -> DataLoader[Any]:
    samples = data(seed)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    sampler: Any = DistributedSampler(samples, size, rank, shuffle=False)
    return DataLoader(samples, batch_size=2, sampler=sampler)


def together(seed: int, size: int) -> list[Batch]:
    """The ranks' batches of each step as one."""
    x, y = data(seed).tensors
    found: list[Batch] = []
    for i in range(0, SIZE, 2 * size):
        at = [i + r + j for r in range(size) for j in (0, size)]
        found.append((x[at], y[at]))
    return found


def run(
    model: nn.Module, load: Any, method: Any, steps: int, of: int | None = None, **more: Any
) -> mtu.History:
    """A run whose optimizer has the first `of` parameters, or all."""
    optimizer = torch.optim.AdamW(list(model.parameters())[:of], lr=1e-2)
    return mtu.unlearn(
        model,
        optimizer,
        forget=load(1),
        retain=load(2),
        validation=load(3),
        losses=losses,
        score=accuracy,
        method=method,
        max_steps=steps,
        every=3,
        progress=False,
        **({"levels": False} | more),
    )


def same_run(ours: mtu.History, truth: mtu.History) -> None:
    assert ours.reason == truth.reason and ours.step == truth.step
    for one, other in zip(ours.records, truth.records, strict=True):
        for name in ("forget", "retain", "forget_loss", "retain_loss", "drift"):
            a, b = getattr(one, name), getattr(other, name)
            assert a.keys() == b.keys()
            assert all(abs(a[task] - b[task]) <= 1e-10 for task in a), (name, a, b)


def wrapped(kind: str, group: Any = None, mesh: DeviceMesh | None = None) -> nn.Module:
    model = model_of()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, process_group=group)
    if group is not None:
        mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [whole(p.detach()) for p in model.parameters()]


@case
def unlearn_as_on_one_process() -> None:
    size = dist.get_world_size()
    for kind in ("ddp", "fsdp"):
        # each method and each kind with more ranks than two
        methods = (mtu.OrthoGrad(0.5), mtu.PCGrad())
        for method in methods if size == 2 else methods[kind == "fsdp" :][:1]:
            model, plain = wrapped(kind), model_of()
            ours = run(model, shares, method, 7)
            truth = mtu_alone(plain, method, 7, size)
            same_run(ours, truth)
            for p, q in zip(parameters_of(model), plain.parameters(), strict=True):
                close(p, q.detach())
                same_everywhere(p)


@case
def unlearn_with_kept_rows_and_levels() -> None:
    """Constraints of earlier steps, and levels by quantiles: ranks of a loss among those of all ranks."""
    size = dist.get_world_size()
    for kind in ("ddp", "fsdp"):
        for method in (mtu.OrthoGrad(0.5), mtu.LevelledOrthoGrad()):
            model, plain = wrapped(kind), model_of()
            kept: list[dict[str, Any]]
            kept = [{"memory": mtu.Memory(9), "levels": mtu.Levels(quantiles=True)} for _ in "ab"]
            ours = run(model, shares, method, 7, **kept[0])
            truth = mtu_alone(plain, method, 7, size, **kept[1])
            same_run(ours, truth)
            for p, q in zip(parameters_of(model), plain.parameters(), strict=True):
                close(p, q.detach())
                same_everywhere(p)
            assert len(kept[0]["memory"]) == len(kept[1]["memory"]) == 9
            assert kept[0]["levels"].kappa == kept[1]["levels"].kappa


@case
def unlearn_that_settles() -> None:
    """Held-out scores, by which the nearest evaluation is told, are those of all ranks."""
    size = dist.get_world_size()
    for kind in ("ddp", "fsdp"):
        model, plain = wrapped(kind), model_of()
        given = {"settle": 6, "levels": True}
        ours = run(model, shares, mtu.GradDiff(0.2), 40, **given)
        truth = mtu_alone(plain, mtu.GradDiff(0.2), 40, size, **given)
        same_run(ours, truth)
        assert ours.reason == "level" and ours.records[-1].step == (ours.reached or 0) + 6
        assert ours.records[-1].validation.keys() == truth.records[-1].validation.keys()
        for p, q in zip(parameters_of(model), plain.parameters(), strict=True):
            close(p, q.detach())
            same_everywhere(p)


def mtu_alone(plain: nn.Module, method: Any, steps: int, size: int, **more: Any) -> mtu.History:
    """Of one process, which is meant."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(plain, lambda seed: together(seed, size), method, steps, **more)


def folder() -> Path:
    found: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    return Path(found[0])


@case
def unlearn_resumes() -> None:
    """As many ranks go on to the same bits."""
    method = mtu.InterferenceAware()
    for kind in ("ddp", "fsdp"):
        path = folder() / "run.pt"
        straight, again = wrapped(kind), wrapped(kind)
        run(straight, shares, method, 6, checkpoint=folder() / "other.pt", **subspace())
        run(again, shares, method, 3, checkpoint=path, **subspace())
        again = wrapped(kind)
        history = run(again, shares, method, 6, checkpoint=path, **subspace())
        assert history.step == 6 and [r.step for r in history.records] == [0, 3, 6]
        assert all(map(torch.equal, parameters_of(again), parameters_of(straight)))


def subspace() -> dict[str, Any]:
    """What keeps rows."""
    return {"subspace": mtu.Subspace(size=6, every=2), "memory": mtu.Memory(7)}


@case
def unlearn_resumes_on_fewer_ranks() -> None:
    """Of what DDP wrote in one file, and FSDP2 in pieces; what was kept is dealt out anew."""
    size = dist.get_world_size()
    group = dist.new_group(list(range(size - 1)))
    method = mtu.InterferenceAware()
    for kind in ("ddp", "fsdp"):
        path = folder() / "run.pt"
        before, after = subspace(), subspace()
        model = wrapped(kind)
        run(model, shares, method, 6, checkpoint=path, **before)
        wanted, was = squares(before["memory"]), parameters_of(model)
        if dist.get_rank() < size - 1:
            model = wrapped(kind, group)
            go_on = partial(run, model, partial(shares, group=group), method, checkpoint=path)
            go_on(6, **after)  # nothing is left to do
            same_kept(before["memory"], after["memory"])
            close(squares(after["memory"], group), wanted)
            for p, q in zip(parameters_of(model), was, strict=True):
                close(p, q)
            history = go_on(9, **after)
            assert history.step == 9 and [r.step for r in history.records] == [0, 3, 6, 9]
        dist.barrier()


def squares(memory: mtu.Memory, group: Any = None) -> Tensor:
    """Those of all numbers that the ranks keep, added up."""
    block: Any = memory.held.block
    if hasattr(block, "parts"):
        held = [use.tensors[0] for part in block.parts for use in part.uses.values()]
    else:
        held = list(block.matrices)
    found = torch.stack([t.square().sum() for t in held])
    total = found.sum()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def same_kept(before: mtu.Memory, after: mtu.Memory) -> None:
    """The same rows in the same order."""
    assert len(before) == len(after)
    for column in ("sample", "loss"):
        one = getattr(before.held.block.roles, column)
        assert torch.equal(one, getattr(after.held.block.roles, column))


@case
def unlearn_a_loss_that_is_not_finite_on_one_rank() -> None:
    model = wrapped("ddp")

    def bad(net: nn.Module, batch: Batch) -> Tensor:
        found = losses(net, batch)
        return found * torch.nan if net.training and dist.get_rank() == 1 else found

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with raises(DivergedError, "rank 1"):
        mtu.unlearn(
            model,
            optimizer,
            forget=shares(1),
            retain=shares(2),
            losses=bad,
            method=mtu.OrthoGrad(),
            max_steps=2,
            progress=False,
        )


@case
def unlearn_of_unequal_shares() -> None:
    model = wrapped("ddp")
    batches = together(1, 1)[: 3 + dist.get_rank()]
    with raises(ValueError, "forget", "DistributedSampler"):
        run(model, lambda seed: batches if seed == 1 else shares(seed), mtu.OrthoGrad(), 2)


@case
def audit_over_ranks() -> None:
    """As on one process: DDP, FSDP2, and a sharded original too."""
    size = dist.get_world_size()
    more: dict[str, Any] = {"losses": losses, "score": accuracy, "cosine_samples": 2}
    names = dict(zip(("forget", "retain", "test"), (1, 2, 3), strict=True))
    share = {n: shares(s) for n, s in names.items()}
    joined = {n: rank_by_rank(s, size) for n, s in names.items()}
    # what is relearned at once: the original is no better
    more |= {"relearn": lambda parameters: torch.optim.SGD(parameters, lr=0.1), "relearn_limit": 2}
    truth = mtu.audit(model_of(), moved(model_of()), **joined, **more)
    first = None
    kinds = (("ddp", model_of()), ("fsdp", wrapped("fsdp")), ("fsdp", model_of()))
    for kind, original in kinds if size == 2 else kinds[:2]:
        ours = mtu.audit(original, moved(wrapped(kind)), **share, **more)
        for part in ("scores", "membership", "drift", "request", "parameter_shift", "relearn"):
            near(ours.data[part], truth.data[part])
        first = first or ours
        # those of the first rank's batch, whoever holds the parameters
        near(ours.data["cosines"], first.data["cosines"])
    assert first is not None
    assert first.data["cosines"]["unlearned"]["samples"]["forget"] == 2


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    return model


@case
def relearning_over_ranks() -> None:
    size = dist.get_world_size()
    original = model_of()
    tuned = torch.optim.SGD(original.parameters(), lr=0.5)
    x, y = data(1).tensors
    for _ in range(60):
        tuned.zero_grad()
        nn.functional.cross_entropy(original(x), y).backward()
        tuned.step()
    goal = 0.95 * accuracy(original, together(1, size))["loss"]

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.1)

    batches = together(1, size)
    truth = relearn_steps(
        model_of(), batches, losses, lambda m: accuracy(m, batches)["loss"], goal, adam, limit=40
    )
    assert truth is not None and truth > 1
    for kind in ("ddp", "fsdp"):
        model = wrapped(kind)
        before = [p.clone() for p in parameters_of(model)]
        ranks = parallel(model).ranks
        assert ranks is not None
        models = {"original": original, "unlearned": model}
        reading, counts = Reading(losses, accuracy), [{"loss": SIZE // size}] * size
        given = (models, shares(1), reading, ("loss",), adam, 40, RankedCrew(ranks), ranks, counts)
        assert relearn(*given) == {"unlearned": truth}
        for p, was in zip(model.parameters(), before, strict=True):
            assert p.grad is None and torch.equal(whole(p.detach()), was)


@case
def audit_of_unequal_shares() -> None:
    batches = together(1, 1)[: 3 + dist.get_rank()]
    with raises(ValueError, "forget", "DistributedSampler"):
        mtu.audit(
            model_of(),
            wrapped("fsdp"),
            forget=batches,
            retain=shares(2),
            test=shares(3),
            losses=losses,
            score=accuracy,
        )


def rank_by_rank(seed: int, size: int) -> list[Batch]:
    """The samples of the first rank, then those of the next."""
    x, y = data(seed).tensors
    return [(x[r::size], y[r::size]) for r in range(size)]


def near(one: Any, other: Any) -> None:
    """Equal but for rounding, and for what a sampler leaves unknown."""
    if isinstance(one, dict):
        for key in one.keys() & other.keys() - {"index", "worst"}:
            near(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            near(a, b)
    elif isinstance(one, float) and isinstance(other, float):
        assert abs(one - other) <= 1e-8, (one, other)
    else:
        assert one == other, (one, other)
