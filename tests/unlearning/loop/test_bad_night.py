"""Loaders that misbehave, NaN, clocks, and two runs on one checkpoint."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtu_fast.unlearning import loaders
from mtu_fast.unlearning.loop import DivergedError
from mtu_fast.unlearning.loop.lock import locked
from tests.unlearning.loop.scene import held_out, losses, sides
from tests.unlearning.loop.short_run import STEPS, Scene

pytestmark = pytest.mark.usefixtures("one_thread")


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
