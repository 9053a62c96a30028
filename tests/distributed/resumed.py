"""Checkpoints of models in slices: a piece a rank, read again on any number of ranks. Run by `worker`."""

from __future__ import annotations

import errno
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import mtu_fast as mtu
from mtu_fast._distributed.ranks import Ranks
from mtu_fast.unlearning.loop import checkpoint, sealed
from mtu_fast.unlearning.loop.resuming import Saved
from tests.distributed.running import (
    data,
    folder,
    model_of,
    parameters_of,
    run,
    same_run,
    shares,
    wrapped,
)
from tests.distributed.scene import case, close, raises

TOGETHER = 12  # samples of all ranks in a step, which 1, 2, 3 and 4 ranks can share
WRITERS = 2


def part_of(seed: int, rank: int, size: int) -> DataLoader[Any]:
    """A share of steps that are those of one process, whatever the number of ranks."""
    samples = data(seed)
    sampler: Any = DistributedSampler(samples, size, rank, shuffle=False)
    return DataLoader(samples, batch_size=TOGETHER // size, sampler=sampler)


def go(model: nn.Module, group: Any, steps: int, **more: Any) -> mtu.History:
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    method = mtu.OrthoGrad(0.5)
    return run(model, lambda seed: part_of(seed, rank, size), method, steps, **more)


def of_first(values: Any) -> Any:
    """What rank 0 has."""
    found: list[Any] = [values]
    dist.broadcast_object_list(found, 0)
    return found[0]


def pieces_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.*of*"))


@case
def unlearn_in_pieces_resumes_on_any_ranks() -> None:
    """Two ranks write; 1, 2, ... ranks go on as the uninterrupted run, two of them to the same bits."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    groups = {size: dist.new_group(list(range(size))) for size in range(1, ranks + 1)}
    path, truth = folder() / "run.pt", None
    if rank < WRITERS:
        group = groups[WRITERS]
        straight = wrapped("fsdp", group)
        history = go(straight, group, 7)
        go(wrapped("fsdp", group), group, 3, checkpoint=path)
        assert len(pieces_of(path)) == WRITERS
        truth = history, parameters_of(straight)
    history, wanted = of_first(truth)
    written = {p.name: p.read_bytes() for p in [path, *pieces_of(path)]}
    for size, group in groups.items():
        if rank < size:
            begun = path.parent / f"{size}"
            if rank == 0:
                begun.mkdir()
                for name, found in written.items():
                    (begun / name).write_bytes(found)
            dist.barrier(group)
            model = wrapped("fsdp", group)
            same_run(go(model, group, 7, checkpoint=begun / path.name), history)
            for p, q in zip(parameters_of(model), wanted, strict=True):
                close(p, q)
                if size == WRITERS:
                    assert torch.equal(p, q)
            # the old ones are gone
            assert len(pieces_of(begun / path.name)) == size
    if rank == 0:
        plain = model_of()
        same_run(go_alone(plain, path, 7), history)
        for p, q in zip(plain.parameters(), wanted, strict=True):
            close(p.detach(), q)
        assert not pieces_of(path)
    dist.barrier()


@case
def unlearn_in_pieces_of_copies() -> None:
    """HSDP, of four ranks: a slice that two of them have is written once."""
    size = dist.get_world_size()
    if size < 4:
        return
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "shards"))
    path, straight, world = folder() / "run.pt", wrapped("fsdp", mesh=mesh), dist.group.WORLD
    history = go(straight, world, 5)
    go(wrapped("fsdp", mesh=mesh), world, 3, checkpoint=path)
    written = [len(sealed.read(piece)["slices"]) for piece in pieces_of(path)]
    assert all(written[: size // 2]) and not any(written[size // 2 :])
    dist.barrier()
    again = wrapped("fsdp", mesh=mesh)
    same_run(go(again, world, 5, checkpoint=path), history)
    assert all(map(torch.equal, parameters_of(again), parameters_of(straight)))


def go_alone(model: nn.Module, path: Path, steps: int, **more: Any) -> mtu.History:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is synchronised
        return go(model, None, steps, checkpoint=path, **more)


@case
def unlearn_written_whole_resumes_in_slices() -> None:
    """One process writes one file; the ranks of an FSDP2 model read each its part of it."""
    path = folder() / "run.pt"
    straight = model_of()
    if dist.get_rank() == 0:
        go_alone(model_of(), path, 3)
    dist.barrier()
    history = go_alone(straight, folder() / f"{dist.get_rank()}.pt", 7)
    model = wrapped("fsdp")
    same_run(go(model, dist.group.WORLD, 7, checkpoint=path), history)
    for p, q in zip(parameters_of(model), straight.parameters(), strict=True):
        close(p, q.detach())


@case
def unlearn_in_pieces_that_are_not_right() -> None:
    """Each is an error on every rank that names the file, and leaves the model as it was."""
    path = folder() / "run.pt"
    run(wrapped("fsdp"), shares, mtu.OrthoGrad(0.5), 3, checkpoint=path)
    last = pieces_of(path)[-1]
    right = last.read_bytes()
    for wrong, words in (
        (None, ("cannot be read", "No such file")),
        # to remove the piece alone would help nobody
        (right[:-7], ("cut short", f"remove {path} to begin anew")),
        (
            right[:99] + bytes([right[99] ^ 1]) + right[100:],
            ("damaged", "checksum", f"remove {path} to begin anew"),
        ),
        (pieces_of(path)[0].read_bytes(), ("not the piece",)),
    ):
        dist.barrier()
        if dist.get_rank() == 0:
            last.unlink() if wrong is None else last.write_bytes(wrong)
        dist.barrier()
        model = wrapped("fsdp")
        before = parameters_of(model)
        with raises(ValueError, "rank", last.name, *words):
            run(model, shares, mtu.OrthoGrad(0.5), 6, checkpoint=path)
        assert all(map(torch.equal, parameters_of(model), before))
    dist.barrier()
    if dist.get_rank() == 0:
        last.write_bytes(right)
    dist.barrier()
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    fully_shard(other)
    with raises(ValueError, "model was", "run.pt"):
        run(other, shares, mtu.OrthoGrad(0.5), 6, checkpoint=path)
    with raises(ValueError, "rank 0", "run.pt", "parameter 3", "optimizer's 3"):
        run(wrapped("fsdp"), shares, mtu.OrthoGrad(0.5), 6, of=3, checkpoint=path)
    run(wrapped("fsdp"), shares, mtu.OrthoGrad(0.5), 6, checkpoint=path)


@case
def unlearn_in_pieces_that_are_incomplete() -> None:
    """Each part left out, under checksums that fit: an error that names the file, on every rank."""
    path = folder() / "run.pt"
    run(wrapped("fsdp"), shares, mtu.OrthoGrad(0.5), 3, checkpoint=path)
    whole, names = sealed.read(path), [p.name for p in pieces_of(path)]
    dist.barrier()
    go_on = partial(run, load=shares, method=mtu.OrthoGrad(0.5), steps=6, checkpoint=path)
    if dist.get_rank() == 0:
        for left_out in whole:
            sealed.write(path, {key: part for key, part in whole.items() if key != left_out})
            with raises(ValueError, "run.pt"):
                checkpoint.load(path, whole["settings"], ("method",))
    dist.barrier()
    first = path.with_name(names[0])
    piece = sealed.read(first)
    for wrong in wrong_pieces(piece):
        if dist.get_rank() == 0:
            name, digest = sealed.write_piece(path, "0of9", wrong)
            pieces = [(name, digest), *whole["pieces"][1:]]
            sealed.write(path, whole | {"pieces": pieces})
        dist.barrier()
        model = wrapped("fsdp")
        before = parameters_of(model)
        with raises(ValueError, "run.pt"):
            go_on(model)
        assert all(map(torch.equal, parameters_of(model), before))
        dist.barrier()


@case
def unlearn_in_pieces_on_a_full_disk() -> None:
    """One rank cannot write: all raise, the pieces of this step go, and those of the last one serve."""
    path, last = folder() / "run.pt", dist.get_world_size() - 1
    model = wrapped("fsdp")
    run(model, shares, mtu.OrthoGrad(0.5), 3, checkpoint=path)
    before = parameters_of(model)
    files = {p.name: p.read_bytes() for p in [path, *pieces_of(path)]}
    dist.barrier()
    write = sealed.write_piece

    def full(*args: Any) -> Any:
        if dist.get_rank() == last:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    with (
        patch.object(sealed, "write_piece", full),
        raises(OSError, f"rank {last}", "No space left"),
    ):
        run(model, shares, mtu.OrthoGrad(0.5), 6, checkpoint=path)
    dist.barrier()
    assert {p.name: p.read_bytes() for p in [path, *pieces_of(path)]} == files
    # the last evaluation is that of step 6
    assert not any(map(torch.equal, parameters_of(model), before))


@case
def unlearn_resumes_with_statistics_of_each_rank() -> None:
    """BatchNorm in training has seen other batches on each rank; a run goes on with those of each."""
    for kind in ("fsdp", "ddp"):
        path, straight, again = folder() / f"{kind}.pt", normed(kind), normed(kind)
        history = run(straight, shares, mtu.OrthoGrad(0.5), 6)
        assert history.step == 6
        run(normed(kind), shares, mtu.OrthoGrad(0.5), 3, checkpoint=path)
        same_run(run(again, shares, mtu.OrthoGrad(0.5), 6, checkpoint=path), history)
        for a, b in zip(straight.buffers(), again.buffers(), strict=True):
            close(a.double(), b.double())


def normed(kind: str) -> nn.Module:
    torch.manual_seed(3)
    # without a bias, whose gradient would be rounding alone, of which AdamW makes whole steps
    parts = nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)
    model: Any = nn.Sequential(*parts).double()
    if kind == "fsdp":
        fully_shard(model)
        return model
    model = nn.parallel.DistributedDataParallel(model)
    # as its option, which has another name from torch 2.13 on
    model.broadcast_buffers = False
    return model


@case
def unlearn_in_pieces_of_several_folders() -> None:
    """Each rank has a folder of its own under one path: told when the first checkpoint is written."""
    own, before = folder() / f"{dist.get_rank()}", Path.cwd()
    own.mkdir()
    os.chdir(own)
    try:
        with raises(FileNotFoundError, "rank 0", "rank 1 wrote run.pt.1of2.", "all ranks see"):
            run(wrapped("fsdp"), shares, mtu.OrthoGrad(0.5), 3, checkpoint="run.pt")
    finally:
        os.chdir(before)
    assert not (own / "run.pt").exists()


def wrong_pieces(piece: dict[str, Any]) -> Iterator[dict[str, Any]]:
    at, t = next(iter(piece["slices"].items()))
    for part in ("own", "slices"):
        yield {key: found for key, found in piece.items() if key != part}
    for slices in ({}, {at: t[:, :-1]}, {at: t.float()}):
        yield piece | {"slices": slices}
    for name in piece["own"]:
        yield piece | {"own": {key: part for key, part in piece["own"].items() if key != name}}


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor on this rank that an op gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor):
                own = t.to_local() if isinstance(t, DTensor) else t
                self.numel = max(self.numel, own.numel())
        return found


@contextmanager
def watched(seen: Largest) -> Iterator[None]:
    """What is made while checkpoints are written, read, and put in place."""
    names = ("state", "write", "read", "go_to")
    before = {name: getattr(Saved, name) for name in names}

    def watching(function: Any) -> Any:
        def call(*args: Any) -> Any:
            with seen:
                return function(*args)

        return call

    for name, function in before.items():
        setattr(Saved, name, watching(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(Saved, name, function)


@case
def unlearn_in_pieces_holds_nothing_whole() -> None:
    """No tensor of a checkpoint is larger than a slice, and no slice travels."""
    wide, size, seen = 240, dist.get_world_size(), Largest()
    path = folder() / "run.pt"
    for steps in (3, 6):
        model = nn.Sequential(nn.Linear(5, wide), nn.Tanh(), nn.Linear(wide, wide)).double()
        fully_shard(model)
        sent: list[int] = []
        with watched(seen), counted(sent):
            run(model, shares, mtu.OrthoGrad(0.5), steps, checkpoint=path)
        # of plain values: where slices lie, and names
        assert 0 < sum(sent) < wide * wide
    largest = wide * -(-wide // size)
    assert 0 < largest <= seen.numel < wide * wide


@contextmanager
def counted(sent: list[int]) -> Iterator[None]:
    """Bytes of all values that a checkpoint's collectives carry."""
    objects = Ranks.objects

    def counting(self: Ranks, what: str, mine: object) -> list[Any]:
        if what.startswith("unlearn: checkpoint"):
            sent.append(len(pickle.dumps(mine)))
        return objects(self, what, mine)

    Ranks.objects = counting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Ranks.objects = objects  # type: ignore[method-assign]
