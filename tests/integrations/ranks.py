"""Two processes as `torchrun` starts them, forked so that nothing is imported anew."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

LIMIT = 120  # seconds, on a busy machine
SIZE = 2


def on_two(function: Callable[..., Any], *given: Any) -> list[Any]:
    """What a function returns on each of two ranks.

    Raises:
        AssertionError: it raised on one, or did not end.
    """
    context, port = multiprocessing.get_context("fork"), _free_port()
    found = []
    # or a collection on a rank copies the parent's memory; for good, as in tests/conftest.py: what is thawed is looked
    # at by every later collection, and each run of a Trainer makes one
    gc.freeze()
    for rank in range(SIZE):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_on_rank, args=(rank, port, send, function, given))
        with warnings.catch_warnings():
            # from Python 3.12 on it is said where there are other threads, as those of pytest-xdist
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            process.start()
        send.close()
        found.append((process, receive))
    outcomes = [_outcome(*each) for each in found]
    for rank, (_, error) in enumerate(outcomes):
        assert error is None, f"rank {rank}: {error}"
    return [value for value, _ in outcomes]


def _outcome(process: Any, receive: Any) -> tuple[Any, str | None]:
    try:
        if receive.poll(LIMIT):
            value, error = pickle.loads(receive.recv_bytes())
            return value, error
        return None, f"no answer within {LIMIT} s"
    except EOFError:
        return None, "ended without an answer"
    finally:
        process.join(5)
        process.kill()


def _on_rank(rank: int, port: int, send: Any, function: Callable[..., Any], given: Any) -> None:
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_WORLD_SIZE": SIZE}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    forget_the_parent()
    outcome: tuple[Any, str | None]
    try:
        outcome = function(*given), None
    except BaseException:  # pytest's own, too
        outcome = None, traceback.format_exc()
    send.send_bytes(pickle.dumps(outcome))


def forget_the_parent() -> None:
    """Accelerate keeps one state a process, in which it is alone."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
