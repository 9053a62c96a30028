"""A rank that is killed, or stopped, at one place of a step; what the others come to. Run by `test_killed`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import mtu_fast as mtu
from mtu_fast._distributed.ranks import Ranks
from tests.distributed import parallel, running
from tests.distributed.scene import mine, pair, per_rank
from tests.distributed.sharded import sharded

TIMEOUT = 4  # seconds for a collective
BETWEEN = "between two steps"


def run(
    rank: int, size: int, folder: str, kind: str, where: str, dies: int, how: signal.Signals
) -> None:
    """Steps, of which the second ends one rank; the others write after how many seconds, and what was raised.

    Args:
        rank: of this process.
        size: how many there are.
        folder: for the store, a checkpoint, and a file of each rank.
        kind: of the model.
        where: the collective before which the rank ends, or BETWEEN.
        dies: the rank that ends.
        how: the signal that it ends by.
    """
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    step, model = LOOPS[kind](folder)
    step(0)
    if rank == dies:
        if where == BETWEEN:
            os.kill(os.getpid(), how)
        _ends_before(where, how)
    start, text = time.monotonic(), ""
    try:
        step(1)
    except RuntimeError as error:
        text = str(error)
    seconds = time.monotonic() - start
    untouched = all(p.grad is None for p in model.parameters())
    (Path(folder) / str(rank)).write_text(f"{seconds}\n{untouched}\n{text}")
    os._exit(0)  # to leave the group would wait for the rank that is no more


def _ends_before(where: str, how: signal.Signals) -> None:
    """This process ends when it comes to a collective."""
    run_it = Ranks._run

    def spied(self: Ranks, what: str, collective: Callable[[], Tensor]) -> Tensor:
        if what == where:
            os.kill(os.getpid(), how)
        return run_it(self, what, collective)

    Ranks._run = spied  # type: ignore[method-assign]


Loop = tuple[Callable[[int], object], torch.nn.Module]


def _group(folder: str) -> Loop:
    return _of_pair(pair())


def _ddp(folder: str) -> Loop:
    return _of_pair(pair(wrapped=True))


def _fsdp(folder: str) -> Loop:
    return _of_pair(sharded())


def _of_pair(it: Any) -> Loop:
    def step(i: int) -> None:
        it.inside.zero_grad()
        data = mine(per_rank(i))
        mask = {"forget": data.forget, "present": data.present}
        it.engine.backward(data.losses(it.model), mtu.OrthoGrad(0.3), **mask)

    return step, it.inside


def _tensor_parallel(folder: str) -> Loop:
    it = parallel.Both()

    def step(i: int) -> None:
        it.model.zero_grad()
        words, mask = parallel.data(i)
        it.engine.backward(it.model(words), mtu.OrthoGrad(0.3), forget=mask)

    return step, it.model


def _unlearn(kind: str, folder: str) -> Loop:
    """A run of the loop with a checkpoint; its second half."""
    model, path = running.wrapped(kind), Path(folder) / "run.pt"

    def half(i: int) -> None:
        steps = 3 * (i + 1)
        running.run(model, running.shares, mtu.OrthoGrad(0.5), steps, checkpoint=path)

    return half, model


LOOPS: dict[str, Callable[[str], Loop]] = {
    "group": _group,
    "ddp": _ddp,
    "fsdp": _fsdp,
    "tensor parallel": _tensor_parallel,
    "unlearn": partial(_unlearn, "ddp"),
    "unlearn in slices": partial(_unlearn, "fsdp"),
}
