"""A checkpoint that is damaged, cut short or of something else is refused before anything is touched."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import mtu_fast as mtu
from mtu_fast.unlearning.loop import sealed
from tests.unlearning.loop.scene import net, parameters, sgd, sides

pytestmark = pytest.mark.usefixtures("one_thread")


class Scene:
    """A run whose parts are easy to compare."""

    def __init__(self, path: Any, seed: int = 5) -> None:
        self.model = net(seed=seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.path = path

    def run(self, **more: Any) -> mtu.History:
        given: dict[str, Any] = {
            **sides(),
            "method": mtu.GradDiff(),
            "max_steps": 3,
            "every": 2,
            "progress": False,
            "checkpoint": self.path,
            **more,
        }
        return mtu.unlearn(self.model, self.optimizer, **given)

    def refused(self, message: str, error: type[Exception] = ValueError, **more: Any) -> str:
        """The error of a run that leaves model, optimizer and random state alone."""
        before, state = parameters(self.model), torch.get_rng_state()
        with pytest.raises(error, match=message) as caught:
            self.run(**more)
        assert torch.equal(parameters(self.model), before)
        assert not self.optimizer.state
        assert torch.equal(torch.get_rng_state(), state)
        return str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after three steps."""
    path = tmp_path_factory.mktemp("run") / "run.pt"
    Scene(path).run()
    return path


def copy(whole: Path, folder: Path) -> Path:
    return Path(shutil.copy(whole, folder / "run.pt"))


# ---- mutations -----------------------------------------------------------------------------------


def test_a_file_that_was_cut_short(whole: Path, tmp_path: Path) -> None:
    """At every length, the longest first."""
    content, path = whole.read_bytes(), tmp_path / "cut.pt"
    path.write_bytes(content)
    read = []
    for length in range(len(content) - 1, -1, -1):
        os.truncate(path, length)
        try:
            sealed.read(path)
            read.append(length)
        except ValueError as error:  # pytest.raises would take longer than the reading
            assert "cut.pt is no checkpoint" in str(error) or "cut.pt is damaged" in str(error)
    assert not read
    path.write_bytes(content[: len(content) // 2])
    Scene(path).refused(r"cut.pt is no checkpoint .*, or it was cut short: its \d+ bytes")


def test_a_file_with_bytes_at_its_end(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.pt"
    path.write_bytes(whole.read_bytes() + b"\0")
    Scene(path).refused("long.pt is no checkpoint")


def test_flipped_bits(whole: Path, tmp_path: Path) -> None:
    content, path = whole.read_bytes(), tmp_path / "flipped.pt"
    draw = random.Random(0)
    for _ in range(200):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"flipped.pt (is no checkpoint|is damaged)"):
            sealed.read(path)
    Scene(path).refused("flipped.pt (is no checkpoint|is damaged)")


def places(state: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where a key can be dropped: everywhere in the file but in the parts of others."""
    found = []
    for name, part in state.items():
        found.append((*above, name))
        if isinstance(part, Mapping) and name not in ("model", "optimizer", "settings"):
            found += places(part, (*above, name))
    return found


def test_every_key_is_needed(whole: Path, tmp_path: Path) -> None:
    path, stored = tmp_path / "partial.pt", sealed.read(whole)
    dropped = places(stored)
    assert len(dropped) > 30
    for place in dropped:
        state = sealed.read(whole)
        part = state
        for name in place[:-1]:
            part = part[name]
        del part[place[-1]]
        sealed.write(path, state)
        Scene(path).refused(r"checkpoint: .*partial\.pt (is|does)")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", -5, "is damaged: step is -5, expected at least 0"),
        ("step", 10**30, "is damaged: step is 1000.*, expected at least 0 and at most"),
        ("step", True, "is damaged: step is bool, expected int"),
        ("step", "3", "is damaged: step is str, expected int"),
        ("seconds", float("inf"), "is damaged: seconds is inf, expected at least 0"),
        ("seconds", float("nan"), "is damaged: seconds is nan, expected at least 0"),
        ("model", [], "is damaged: model is list, expected Mapping"),
        ("model", {}, "does not fit this run, which is as it was: .*Missing key"),
        ("optimizer", {"state": {}, "param_groups": []}, "does not fit this run.*parameter groups"),
        ("history", {}, "is incomplete: it holds no history.tasks"),
        ("settings", None, "is incomplete: it holds no settings"),
        ("format", 1, "is no checkpoint of this version"),
    ],
)
def test_parts_that_make_no_sense(
    name: str, value: Any, message: str, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "odd.pt"
    sealed.write(path, sealed.read(whole) | {name: value})
    Scene(path).refused(f"checkpoint: .*odd.pt {message}")


def test_a_history_with_other_fields(whole: Path, tmp_path: Path) -> None:
    path, state = tmp_path / "odd.pt", sealed.read(whole)
    state["history"]["records"][0]["more"] = 1
    sealed.write(path, state)
    Scene(path).refused("odd.pt is damaged: its history has .*more")
    sealed.write(path, state | {"history": state["history"] | {"records": []}})
    Scene(path).refused("odd.pt is damaged: history holds no record")


@pytest.mark.parametrize("value", ["x", None, [], {}, torch.ones(2)], ids=repr)
def test_a_history_of_other_values(value: Any, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    for side in ("forget", "retain", "forget_loss", "retain_loss", "drift"):
        state = sealed.read(whole)
        state["history"]["records"][-1][side]["a"] = value
        sealed.write(path, state)
        Scene(path).refused(rf"odd.pt is damaged: history.records\[\d\].{side} holds 'a': ")
    for name in ("tasks", "targets"):
        state = sealed.read(whole)
        state["history"][name] = ["a", value] if not isinstance(value, str) else value
        sealed.write(path, state)
        Scene(path).refused(f"odd.pt is damaged: history.{name} is .*expected names")


def test_a_file_of_torch_and_a_folder(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "weights.pt")
    Scene(tmp_path / "weights.pt").refused("weights.pt is no checkpoint of this version")
    Scene(tmp_path).refused("is a folder, expected a file")


def test_what_fits_but_is_of_more_batches(whole: Path, tmp_path: Path) -> None:
    """The error comes when the model has its new state already, and puts the old one back."""
    path, state = copy(whole, tmp_path), sealed.read(whole)
    state["retain_place"]["given"] = 99
    sealed.write(path, state)
    Scene(path).refused("retain: the loader ended after 5 batches, but 99", RuntimeError)


# ---- the file system -----------------------------------------------------------------------------


def test_leftovers_of_killed_writers_are_removed(whole: Path, tmp_path: Path) -> None:
    path = copy(whole, tmp_path)
    kept = ["run.pt", "other.pt.12.part", "run.pt.x.part", "run.pt.12.part.old"]
    for name in (*kept[1:], "run.pt.12.part", "run.pt.999999.part"):
        (tmp_path / name).write_bytes(b"half")
    Scene(path).run()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run.pt"
    link.symlink_to(tmp_path / "disk" / "real.pt")
    Scene(link).run(max_steps=1)
    assert link.is_symlink() and [file.name for file in (tmp_path / "disk").iterdir()] == [
        "real.pt"
    ]
    history = Scene(link).run()
    assert link.is_symlink() and history.step == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["disk", "run.pt"]


def test_links_that_lead_round_in_a_circle(tmp_path: Path) -> None:
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    one.symlink_to(other)
    other.symlink_to(one)
    Scene(one).refused("one.pt is a link that leads back to itself", OSError)
    assert one.is_symlink() and other.is_symlink()


class Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file = file
        self.room = room

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def on_full_disk(room: int) -> Callable[..., Any]:
    real = Path.open

    def opened(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        file = real(path, mode, *more, **named)
        return Full(file, room) if mode == "wb" else file

    return opened


@pytest.mark.parametrize("room", [0, 30, 5000, -1])
def test_a_full_disk_keeps_file_and_state(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    Scene(path).run(max_steps=2)
    content = path.read_bytes()
    room = len(content) - 10 if room < 0 else room  # within the checksum
    scene, other = Scene(path), Scene(None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", on_full_disk(room))
        with pytest.raises(OSError, match=r"run.pt could not be written: No space left") as caught:
            scene.run(max_steps=3)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == content and [f.name for f in tmp_path.iterdir()] == ["run.pt"]
    other.run(max_steps=3)
    assert torch.equal(parameters(scene.model), parameters(other.model))
    assert all(p.grad is None for p in scene.model.parameters())
    again = Scene(path)
    again.run(max_steps=3)
    assert torch.equal(parameters(again.model), parameters(other.model))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def opened(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        if mode == "wb":
            raise OSError(code, os.strerror(code))
        return real(path, mode, *more, **named)

    monkeypatch.setattr(Path, "open", opened)
    message = rf"run.pt could not be written: {os.strerror(code)}"
    Scene(tmp_path / "run.pt").refused(message, OSError)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_a_path() -> None:
    scene = Scene(5)
    scene.refused("checkpoint: found 5, expected the path of a file", TypeError)


def test_an_interrupt_in_the_middle_of_a_write_is_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch turns what is raised while it writes into a RuntimeError."""

    class Interrupted(Full):
        def write(self, data: bytes) -> int:
            raise KeyboardInterrupt

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r": Interrupted(real(path, mode), 0))
    model = net()
    with pytest.raises(KeyboardInterrupt):
        mtu.unlearn(
            model,
            sgd(model),
            **sides(),
            method=mtu.GradDiff(),
            max_steps=1,
            checkpoint=tmp_path / "run.pt",
            progress=False,
        )
    assert list(tmp_path.iterdir()) == []
