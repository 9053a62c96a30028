"""Jobs in processes of one thread each, so that results do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

Job = tuple[Callable[..., Any], tuple[Any, ...]]


@contextmanager
def one_thread() -> Iterator[None]:
    """What a process of the pool runs under: results then do not depend on the number of processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def do(jobs: Sequence[Job], workers: int, title: str) -> list[Any]:
    """The jobs' results, in the order in which they end; in this process if there is one worker."""
    with tqdm(total=len(jobs), desc=title, unit="job") as bar, one_thread():
        if workers == 1:
            return list(_counted((function(*arguments) for function, arguments in jobs), bar))
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
            waiting = [pool.submit(function, *arguments) for function, arguments in jobs]
            return list(_counted((done.result() for done in as_completed(waiting)), bar))


def _counted(results: Iterable[Any], bar: Any) -> Iterator[Any]:
    for result in results:
        bar.update()
        yield result
