"""The trials of benchmarks/reliability.py at tiny sizes, and that a trial which does not hold is counted."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import reliability

pytestmark = pytest.mark.usefixtures("one_thread")


def test_steps_and_kills_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "MODELS", ("mlp",))
    monkeypatch.setattr(reliability, "WARM", 20)
    (grown,) = reliability.steps(60)
    assert grown.held == grown.tried == 60, grown.seen
    (killed,) = reliability.kills(1)
    assert killed.held == killed.tried == 1


def test_what_grows_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    objects = reliability.held_objects

    def leaking() -> int:
        kept.extend([] for _ in range(10_000))
        return objects()

    monkeypatch.setattr(reliability, "MODELS", ("mlp",))
    monkeypatch.setattr(reliability, "held_objects", leaking)
    (grown,) = reliability.steps(reliability.WARM)
    assert grown.held == 0 and "objects" in grown.seen


def test_a_damaged_file_that_is_read_is_counted(tmp_path: Path) -> None:
    whole = tmp_path / "run.pt"
    reliability.Scene(whole).run()
    content = whole.read_bytes()
    assert not reliability.refused(tmp_path / "copy.pt", content)
    assert reliability.refused(tmp_path / "copy.pt", content[:-1])
    assert reliability.flipped(content, 3) != content


def test_rows_replace_those_of_their_part(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    old = [reliability.Row("kills", "old", 1, 1, ""), reliability.Row("calls", "kept", 2, 2, "")]
    reliability.write(path, old)
    reliability.write(path, [reliability.Row("kills", "new", 3, 3, "")])
    with path.open(newline="") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == ["kept", "new"]
