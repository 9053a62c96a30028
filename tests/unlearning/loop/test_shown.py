"""What is shown of a run: its history, a bar, a log."""

from __future__ import annotations

import builtins
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mtu_fast as mtu
from mtu_fast.unlearning.loop import progress
from tests.unlearning.loop.scene import (
    held_out,
    net,
    run,
    sides,
    trained,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_history_as_json_and_as_a_plot(tmp_path: Path) -> None:
    model = trained(net())
    history = run(model, **sides(), validation=held_out(), max_steps=4, every=2)
    history.to_json(tmp_path / "h.json")
    stored = json.loads((tmp_path / "h.json").read_text())
    assert stored["reason"] == "max_steps" and stored["explanation"] == history.explanation
    assert [record["step"] for record in stored["records"]] == [0, 2, 4]
    assert mtu.History.from_dict(stored) == history
    figure = history.plot(tmp_path / "h.png")
    assert (tmp_path / "h.png").stat().st_size > 1000
    assert [axes.get_title() for axes in figure.axes] == ["a (target)", "b (target)"]
    forget = figure.axes[0].lines[0]
    assert list(forget.get_xdata()) == [0, 2, 4]
    assert list(forget.get_ydata()) == [record.forget["a"] for record in history.records]


@pytest.mark.parametrize("write", [mtu.History.to_json, mtu.History.plot])
def test_a_history_names_the_folder_that_is_not_there(
    write: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"path: there is no folder .*nodir for x.png; make it first, Path\(",
    ):
        write(mtu.History(("a",), ("a",)), tmp_path / "nodir" / "x.png")


def test_neither_bar_nor_plot_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("tqdm", "matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    model = trained(net())
    history = run(model, **sides(), max_steps=1, progress=True)
    with pytest.raises(ImportError, match=r"pip install 'mtu_fast\[demo\]'"):
        history.plot()


def test_the_bar_counts_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(net())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(model, **sides(), max_steps=6, every=3, progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "forget -" in shown and "retain -" in shown


def test_a_log_has_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps, of 11 seconds each by this clock: a line every third one, and one at the end."""
    clock = itertools.count(0, 11)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    run(trained(net()), **sides(), max_steps=10, every=5, progress=True)
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert "\r" not in shown and 4 <= len(lines) <= 5
    assert all(re.match(r"unlearn: step \d+/10, forget -.*, retain -", line) for line in lines)
    assert lines[-1].startswith("unlearn: step 10/10") and lines[-1].endswith("max_steps")


def test_nothing_is_shown_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run(trained(net()), **sides(), max_steps=2, progress=False)
    assert capsys.readouterr().err == ""
