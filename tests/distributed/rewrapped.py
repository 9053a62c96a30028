"""A run goes on in another wrapper than the one it was begun in. Run by `worker`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

import mtu_fast as mtu
from tests.distributed.resumed import TOGETHER, go, go_alone, of_first, pieces_of
from tests.distributed.running import folder, model_of, parameters_of, same_run, wrapped
from tests.distributed.scene import case, close, mine, pair, per_rank, raises

WRAPPERS = ("ddp", "fsdp", "bare")


def ended(kind: str, path: Path, steps: int) -> tuple[mtu.History, nn.Module] | None:
    """A run in a wrapper; None on ranks that take no part."""
    memory = mtu.Memory(2 * TOGETHER)
    if kind != "bare":
        model = wrapped(kind)
        return go(model, dist.group.WORLD, steps, checkpoint=path, memory=memory), model
    if dist.get_rank():
        return None
    model = model_of()
    return go_alone(model, path, steps, memory=memory), model


@case
def unlearn_goes_on_in_another_wrapper() -> None:
    """DDP, FSDP2, or one process: each goes on with what another wrote, as without a break."""
    found: Any = ended("bare", folder() / "straight.pt", 7)
    history, wanted = of_first(found and (found[0], parameters_of(found[1])))
    for begun in WRAPPERS:
        path = folder() / f"{begun}.pt"
        ended(begun, path, 3)
        dist.barrier()
        for kind in WRAPPERS:
            own = path.parent / f"{begun}-{kind}"
            if dist.get_rank() == 0:
                own.mkdir()
                for part in (path, *pieces_of(path)):
                    shutil.copy(part, own)
            dist.barrier()
            found = ended(kind, own / path.name, 7)
            dist.barrier()
            if found is None:
                continue
            same_run(found[0], history)
            for p, q in zip(parameters_of(found[1]), wanted, strict=True):
                close(p, q)


@case
def a_memory_of_other_settings_on_one_rank() -> None:
    """Rows travel on all ranks or on none: what one finds in its settings, all raise."""
    rank = dist.get_rank()
    kept: Any
    for kind in (mtu.Memory, mtu.Subspace):
        method = mtu.OrthoGrad(0.3) if kind is mtu.Memory else mtu.InterferenceAware()
        name = "memory" if kind is mtu.Memory else "subspace"
        for of_rank, words in (
            ({"every": 2 + rank}, (kind.__name__, "other settings", "'every': 3")),
            ({"tasks": ["a", "c"][rank == 1 :][:1]}, ("rank 1", "tasks names ['c']")),
        ):
            it = pair()
            kept = {name: kind(**of_rank)}
            data = mine(per_rank())
            with raises(ValueError, *words):
                it.engine.backward(data.losses(it.model), method, forget=data.forget, **kept)
            assert all(p.grad is None for p in it.inside.shared)
