"""The table of what weights cost beside TorchJD's."""

from __future__ import annotations

import pytest

import mtu_fast as mtu
from benchmarks import weightings


def test_prints_a_line_for_every_method_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    weightings.main(["--rows", "2,3", "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()[1:]
    names = [type(method).__name__ for method in weightings.METHODS]
    assert [line.split()[:2] for line in lines] == [[name, R] for name in names for R in "23"]


def test_both_are_timed_on_conflicting_rows() -> None:
    pytest.importorskip("torchjd")
    G, _ = weightings.problem(6)
    assert (G.tril(-1) < 0).sum() > (G.tril(-1) > 0).sum()
    found = weightings.timed(mtu.DualProj(), 6, 3)
    assert found.theirs is not None and found.ratio is not None and found.ours > 0


def test_without_theirs_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weightings, "theirs", lambda name, R: None)
    assert weightings.timed(mtu.MGDA(), 3, 2).ratio is None
