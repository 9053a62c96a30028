"""Loaders that misbehave, workers that die, NaN, Ctrl-C, clocks, and two runs on one checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

import mtu_fast as mtu
from mtu_fast.unlearning import loaders
from mtu_fast.unlearning.loop import DivergedError, run, sealed
from mtu_fast.unlearning.loop.interrupts import or_undone, uninterrupted
from mtu_fast.unlearning.loop.lock import locked
from tests.unlearning.loop.scene import data, held_out, losses, net, parameters, sides

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP = Path(run.__file__).parent
STEPS, EVERY = 4, 2


class Scene:
    """A short run whose state is easy to compare."""

    def __init__(self, path: Path | None = None) -> None:
        self.model = net(seed=5)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.path = path

    def run(self, **more: Any) -> mtu.History:
        given: dict[str, Any] = {
            **sides(),
            "method": mtu.GradDiff(),
            "max_steps": STEPS,
            "every": EVERY,
            "progress": False,
            "checkpoint": self.path,
            **more,
        }
        return mtu.unlearn(self.model, self.optimizer, **given)

    def step(self) -> int:
        """The evaluation whose state model and optimizer have."""
        found = [s for s in states() if torch.equal(states()[s], parameters(self.model))]
        assert len(found) == 1, "the model is in no state of an evaluation"
        made = {int(one["step"]) for one in self.optimizer.state.values()} or {0}
        assert made == {found[0]}
        assert all(p.grad is None for p in self.model.parameters())
        return found[0]


@cache
def states() -> dict[int, Tensor]:
    """{step: parameters} at the evaluations of an undisturbed run."""
    found = {0: parameters(Scene().model)}
    for step in range(EVERY, STEPS + 1, EVERY):
        scene = Scene()
        scene.run(max_steps=step)
        found[step] = parameters(scene.model)
    return found


# ---- loaders -------------------------------------------------------------------------------------


class Endless:
    """Batches over and over, in one pass."""

    def __init__(self, batches: Any) -> None:
        self.batches = list(batches)

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(self.batches)


class Sized(Endless):
    """That says it ends."""

    def __len__(self) -> int:
        return len(self.batches)


def test_what_is_retained_may_never_end_where_a_part_is_monitored() -> None:
    scene, given = Scene(), sides()
    scene.run(retain=Endless(given["retain"]), monitor=given["retain"])
    assert scene.step() == STEPS


def test_a_loader_that_never_ends_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    with pytest.raises(ValueError, match=r"retain: .* 111 batches in one pass, but len.* is 5"):
        scene.run(retain=Sized(sides()["retain"]))
    monkeypatch.setattr(loaders, "MANY", 30)
    with pytest.raises(
        UserWarning, match=r"forget: an evaluation has read 30 batches .*never ends"
    ):
        scene.run(forget=Endless(sides()["forget"]))
    assert scene.step() == 0


class Shrinking(list[Any]):
    """Batches of which fewer come from the third pass on: two evaluations and one of steps."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self[: 2 if self.passes > 2 else None])


def test_an_evaluation_of_fewer_samples_says_so() -> None:
    scene = Scene()
    with pytest.warns(
        UserWarning, match="retain: this evaluation saw 8 samples, an earlier one 18"
    ):
        scene.run(retain=Shrinking(sides()["retain"]))
    assert scene.step() == STEPS


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
        for function in (lambda: scene.run(retain=retain, losses=counted), lambda: time.sleep(20)):
            try:
                function()
            except (RuntimeError, OSError, EOFError) as error:
                raised.append(error)
            # a loader that waits for a batch may miss its worker before the signal of its end comes
            if "worker" in str(raised):
                break
    assert "worker" in str(raised)
    assert scene.step() == EVERY


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="Windows has no such signal")
@pytest.mark.parametrize("name", ["SIGINT", "SIGCHLD"])
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


def test_a_score_that_is_not_finite_any_more() -> None:
    """Nothing is below the level then, and the run would never stop."""
    calls = [0]

    def score(model: nn.Module, loader: Any) -> dict[str, float]:
        calls[0] += 1
        values = {1: 1.0, 2: 1.0, 3: 0.5}  # forget, retain, validation, and then
        return dict.fromkeys("ab", values.get(calls[0], float("nan")))

    scene = Scene()
    with pytest.raises(DivergedError, match=r"after step 2, the forget score of \['a', 'b'\]"):
        scene.run(score=score, validation=held_out(), max_steps=50)


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


# ---- clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", [lambda t: -t, lambda t: 1e12 * (t % 2), lambda t: 0.0])
@pytest.mark.parametrize("name", ["time", "perf_counter"])
def test_a_clock_that_jumps(
    clock: Callable[[float], float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = itertools.count()
    monkeypatch.setattr(time, name, lambda: clock(float(next(count))))
    scene = Scene()
    history = scene.run(progress=True)
    assert scene.step() == STEPS
    seconds = [record.seconds for record in history.records]
    assert seconds == sorted(seconds) and seconds[0] == 0.0


# ---- two runs ------------------------------------------------------------------------------------

HOLD = """
import sys, time
from mtu_fast.unlearning.loop.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_checkpoint_that_another_process_uses(tmp_path: Path) -> None:
    path, scene = tmp_path / "run.pt", Scene(tmp_path / "run.pt")
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(
            RuntimeError, match=rf"run.pt is in use by process {other.pid} on .* since"
        ):
            scene.run()
        assert scene.step() == 0
        other.kill()
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt.lock"]  # nobody holds it
    scene.run()
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_run_within_a_run_on_the_same_checkpoint(tmp_path: Path) -> None:
    path, link = tmp_path / "run.pt", tmp_path / "link.pt"
    link.symlink_to(path)

    def nested(model: nn.Module, batch: Any) -> Any:
        if torch.is_grad_enabled():
            Scene(link).run()
        return losses(model, batch)

    scene = Scene(path)
    with pytest.raises(RuntimeError, match=f"link.pt is in use by process {os.getpid()}"):
        scene.run(forget_losses=nested)
    assert scene.step() == 0


def test_locks_follow_one_another(tmp_path: Path) -> None:
    for _ in range(3):
        with locked(tmp_path / "a.pt"):
            assert (tmp_path / "a.pt.lock").exists()
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_needs_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is over can be read from there."""
    path, real = tmp_path / "run.pt", os.open
    Scene(path).run()

    def refuse(name: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return real(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    scene = Scene(path)
    assert scene.run().step == scene.step() == STEPS


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
