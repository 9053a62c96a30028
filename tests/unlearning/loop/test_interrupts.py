"""Ctrl-C at any moment, and workers that die: a run leaves what an evaluation saw."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mtu_fast.unlearning.loop import run, sealed
from mtu_fast.unlearning.loop.interrupts import or_undone, uninterrupted
from tests.unlearning.loop.scene import data, losses
from tests.unlearning.loop.short_run import EVERY, STEPS, Scene, states

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP = Path(run.__file__).parent

# ---- Ctrl-C --------------------------------------------------------------------------------------


def apart(function: Callable[[], object]) -> None:
    """Call in a generator, which has its own record of what is being handled: tracers that raise leave it wrong."""

    def alone() -> Iterator[object]:
        yield function()

    list(alone())


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that is run in the folder of the loop."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.lines = 0

    def __enter__(self) -> Interrupt:
        self.before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        code, above = frame.f_code, frame.f_back
        ending = "__del__" in {code.co_name, above.f_code.co_name if above else ""}
        return self._line if Path(code.co_filename).parent == LOOP and not ending else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self._line


def test_ctrl_c_at_any_moment(tmp_path: Path) -> None:
    """Model and optimizer are those of an evaluation, no file is left over, and the run goes on to the same end."""
    with Interrupt(None) as whole:
        Scene(tmp_path / "whole.pt").run()
    moments = sorted(random.Random(0).sample(range(1, whole.lines + 1), 24))
    seen = set()
    for moment in [*range(1, 20, 6), *moments, *range(whole.lines - 20, whole.lines + 1, 5)]:
        folder = tmp_path / str(moment)
        folder.mkdir(exist_ok=True)
        scene = Scene(folder / "run.pt")
        with Interrupt(moment), pytest.raises(KeyboardInterrupt):
            apart(scene.run)
        seen.add(scene.step())
        assert {file.name for file in folder.iterdir()} <= {"run.pt"}, moment
        again = Scene(folder / "run.pt")
        again.run()
        assert again.step() == STEPS
    assert seen == set(states())


class Second(Interrupt):
    """Sends Ctrl-C at the n-th line that is run in the folder of the loop, and of its contexts, since `begun`."""

    begun = False

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        context = self.begun and frame.f_code.co_filename == contextlib.__file__
        return self._line if context else super()._called(frame, event, argument)

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and self.begun:
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self._line


def test_ctrl_c_at_any_moment_after_an_error(tmp_path: Path) -> None:
    """As of a worker that died: the loader's error first, the signal some lines of code later."""

    def run(at: int | None) -> Second:
        calls = itertools.count(1)

        def fail(model: nn.Module, batch: Any) -> Any:
            if torch.is_grad_enabled() and next(calls) == 4:  # a step after the evaluation
                second.begun = True
                raise ArithmeticError
            return losses(model, batch)

        scene = Scene(tmp_path / "run.pt")
        raised = ArithmeticError if at is None else KeyboardInterrupt
        second = Second(at)
        with second, pytest.raises(raised):
            apart(lambda: scene.run(forget_losses=fail))
        assert scene.step() == EVERY, at
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert [file.name for file in tmp_path.iterdir()] == ["run.pt"], at
        (tmp_path / "run.pt").unlink()
        return second

    # in the background a shell starts processes that ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        lines = run(None).lines
        for at in [*range(1, 40), *random.Random(0).sample(range(40, lines), 16), lines]:
            run(at)
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_cannot_be_undone_is_said() -> None:
    def fail() -> None:
        raise ArithmeticError

    def cannot() -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        or_undone(fail, cannot)


def test_ctrl_c_while_the_state_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = run.put_back

    def impatient(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)
        real(*arguments)

    def fail(model: nn.Module, batch: Any) -> Any:
        if torch.is_grad_enabled():
            raise ArithmeticError
        return losses(model, batch)

    monkeypatch.setattr(run, "put_back", impatient)
    scene = Scene()
    # in the background a shell starts processes that ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            scene.run(forget_losses=fail)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert scene.step() == 0


def test_ctrl_c_inside_torch_save_is_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch ends its archive when it is interrupted, which fails and would hide the Ctrl-C."""

    def interrupted(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 18172 vs 18128")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sealed.write(tmp_path / "run.pt", {"step": 1})
    assert list(tmp_path.iterdir()) == []


# ---- other signals --------------------------------------------------------------------------------


class Deadly(Dataset[Any]):
    """Samples of which one kills its worker, as the system does where memory is short."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag
        self.whole = data()

    def __len__(self) -> int:
        return 18

    def __getitem__(self, index: int) -> Any:
        if self.flag.exists() and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.whole[index + 6]


def test_a_worker_that_dies(tmp_path: Path) -> None:
    flag, calls = tmp_path / "now", [0]

    def counted(model: nn.Module, batch: Any) -> Any:
        calls[0] += torch.is_grad_enabled()
        if calls[0] == 2 * 3:  # in the third step
            flag.touch()
        return losses(model, batch)

    scene = Scene()
    retain = DataLoader(Deadly(flag), 4, num_workers=1)
    raised: list[Exception] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads
        try:
            try:
                scene.run(retain=retain, losses=counted)
            except (RuntimeError, OSError, EOFError) as error:
                raised.append(error)
            # a loader that waits for a batch may miss its worker before the signal of its end comes
            if "worker" not in str(raised):
                time.sleep(20)
        except RuntimeError as late:  # by that signal, at whatever line of these
            raised.append(late)
    # what the loader meets where it misses its worker, or torch's own error
    assert raised and all("worker" in str(e) for e in raised if isinstance(e, RuntimeError))
    assert scene.step() == EVERY


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="Windows has no such signal")
@pytest.mark.parametrize("name", ["SIGINT", "SIGCHLD", "SIGTERM", "SIGALRM", "SIGUSR1"])
def test_signals_wait_until_a_function_is_at_its_end(name: str) -> None:
    number, done = signal.Signals[name], []

    def ends(*args: Any) -> None:
        raise RuntimeError("a signal")

    def function() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        done.append(True)

    before = signal.signal(number, ends)
    try:
        with pytest.raises(RuntimeError, match="a signal"):
            uninterrupted(function)
        assert done == [True] and signal.getsignal(number) is ends
    finally:
        signal.signal(number, before)
