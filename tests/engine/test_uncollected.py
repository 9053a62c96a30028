"""A step and Python's garbage collector: it is off meanwhile, and as it was afterwards."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._uncollected import uncollected

LAYERS = 120  # nodes enough for several collections in a step


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    """The collector is on in a test, whatever it or another did to it."""
    was_on, often = gc.isenabled(), gc.get_threshold()
    gc.enable()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*often)
    (gc.enable if was_on else gc.disable)()


def deep() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(LAYERS))), torch.randn(4, 3)


class Collections:
    """Counts collections in the context while a step is under way, not those right after it."""

    def __enter__(self) -> Collections:
        self.found = 0
        gc.callbacks.append(self._seen)
        return self

    def __exit__(self, *_: Any) -> None:
        gc.callbacks.remove(self._seen)

    def _seen(self, phase: str, info: Any) -> None:
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            if phase == "start" and frame.f_globals.get("__name__") == mtu.engine.__name__:
                self.found += 1
                return


def losses_of(engine: mtu.Engine, x: Tensor) -> Tensor:
    losses: Tensor = engine.model(x).square().sum(1)
    return losses


def step(engine: mtu.Engine, losses: Tensor, how: str) -> None:
    forget = torch.tensor([True, False, False, False])
    if how == "backward":
        engine.backward(losses, mtu.OrthoGrad(0.5), forget=forget)
    elif how == "accumulate":
        engine.accumulate(losses, mtu.OrthoGrad(0.5), forget=forget, sync=True)
    elif how == "rows":
        engine.rows(losses, forget=forget)
    else:
        engine.rows(losses, forget=forget).backward(mtu.OrthoGrad(0.5))


@pytest.mark.parametrize("how", ["backward", "accumulate", "rows"])
def test_nothing_is_collected_within_a_step(how: str) -> None:
    model, x = deep()
    engine = mtu.Engine(model)
    for _ in range(3):
        model.zero_grad()
        losses = losses_of(engine, x)
        gc.collect()  # so that what came before is no reason for one
        with Collections() as within:
            step(engine, losses, how)
        assert within.found == 0
        assert gc.isenabled()


def test_it_is_off_while_rows_are_solved() -> None:
    """Also where rows were taken before, by a call of its own."""
    seen = []

    class Seen(mtu.Mean):
        def __call__(self, G: Tensor | None, roles: mtu.Roles) -> Tensor:
            seen.append(gc.isenabled())
            return super().__call__(G, roles)

    model, x = deep()
    engine = mtu.Engine(model)
    rows = engine.rows(losses_of(engine, x))
    assert gc.isenabled()
    rows.backward(Seen())
    assert seen == [False]
    assert gc.isenabled()


def test_it_would_be_collected_otherwise() -> None:
    model, x = deep()
    engine = mtu.Engine(model)
    losses = losses_of(engine, x)
    gc.collect()
    with Collections() as within:
        mtu.Engine.rows.__wrapped__(engine, losses)  # type: ignore[attr-defined]
    assert within.found > 1


@pytest.mark.parametrize("how", ["backward", "accumulate", "rows", "rows, backward"])
def test_a_step_makes_no_cycles(how: str) -> None:
    model, x = deep()
    engine = mtu.Engine(model)
    for _ in range(2):  # what torch makes at the first time only
        model.zero_grad()
        step(engine, losses_of(engine, x), how)
    gc.collect()
    gc.disable()
    for _ in range(3):
        model.zero_grad()
        step(engine, losses_of(engine, x), how)
    assert gc.collect() == 0


def test_it_is_on_again_after_an_error() -> None:
    model, x = deep()
    engine = mtu.Engine(model)
    with pytest.raises(ValueError, match="losses"):
        engine.backward(model(x).sum(), mtu.OrthoGrad(0.5))
    assert gc.isenabled()


def test_who_turned_it_off_finds_it_off() -> None:
    model, x = deep()
    engine = mtu.Engine(model)
    gc.disable()
    step(engine, losses_of(engine, x), "backward")
    assert not gc.isenabled()


def test_it_is_off_within_and_on_after_nested_calls() -> None:
    seen = []

    @uncollected
    def inner() -> None:
        seen.append(gc.isenabled())

    @uncollected
    def outer() -> None:
        inner()
        seen.append(gc.isenabled())

    outer()
    assert seen == [False, False]
    assert gc.isenabled()


def in_a_thread(function: Callable[[], object]) -> None:
    thread = Thread(target=function)
    thread.start()
    thread.join()


def test_in_other_threads_it_is_left_alone() -> None:
    """A call that ends there would turn it on within another's step."""
    seen = []

    @uncollected
    def asked() -> None:
        seen.append(gc.isenabled())

    in_a_thread(asked)
    assert seen == [True]
    assert gc.isenabled()

    @uncollected
    def around() -> None:
        in_a_thread(asked)
        asked()

    around()
    assert seen == [True, False, False]
    assert gc.isenabled()


@pytest.mark.skipif(sys.platform != "linux", reason="forks beside torch's threads")
def test_a_process_forked_within_a_step_by_another_thread_collects() -> None:
    reading, writing = os.pipe()

    def fork() -> None:
        with warnings.catch_warnings():
            # newer Pythons warn of threads, which the child leaves alone
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            try:
                os.write(writing, b"on" if gc.isenabled() else b"off")
            finally:
                os._exit(0)
        os.waitpid(child, 0)

    uncollected(lambda: in_a_thread(fork))()
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        assert told.read() == b"on"
    assert gc.isenabled()
