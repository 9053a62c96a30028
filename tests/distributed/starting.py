"""Processes of a test: forked from one that has imported all they need, so that each begins at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

# what is imported when a model is first wrapped, and by the first audit: seconds in every process
LATER = ["torch._dynamo", "torch.distributed.fsdp", "sklearn.linear_model"]
IMPORTED = ["tests.distributed.worker", "tests.distributed.killed", *LATER]


def started(function: Callable[..., None], size: int, *args: Any) -> list[BaseProcess]:
    """`function(rank, size, *args)` in a process for each rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    ranks: list[BaseProcess] = [
        context.Process(target=function, args=(rank, size, *args)) for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    return ranks
