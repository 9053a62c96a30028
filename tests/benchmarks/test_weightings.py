"""The table of what weights cost beside TorchJD's, or another tree's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import weightings
from benchmarks.weightings import Case

ROOT = Path(__file__).parents[2]


def test_prints_a_line_for_every_method_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    weightings.main(["--rows", "2,3", "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()[1:]
    names = [type(method).__name__ for method in weightings.METHODS]
    found = [line.split()[:4] for line in lines]
    assert found == [[name, "conflicting", "1", R] for name in names for R in "23"]


def test_both_are_timed_on_conflicting_rows() -> None:
    pytest.importorskip("torchjd")
    case = Case("DualProj", "conflicting", 6, 1)
    G = case.gram()
    assert (G.tril(-1) < 0).sum() > (G.tril(-1) > 0).sum()
    ours, theirs = weightings.beside_torchjd(case, 3)
    assert min(ours) > 0 and min(theirs) > 0
    assert len(case.line([ours, theirs]).split()) == 7


@pytest.mark.parametrize(("layers", "known"), [(1, False), (3, True)])
def test_without_theirs_there_is_no_ratio(
    layers: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TorchJD has none, and on a batch."""
    if not known:
        monkeypatch.setattr(weightings, "theirs", lambda name, R: None)
    case = Case("MGDA", "zero", 3, layers)
    times = weightings.beside_torchjd(case, 2)
    assert len(times) == 1 and len(case.line(times).split()) == 5


def test_another_tree_is_timed_in_its_own_process(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "3", "--kinds", "dependent", "--layers", "2", "--rounds", "2"]
    weightings.main([*options, "--base", str(ROOT)])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(weightings.METHODS) - 1  # GradVac takes no batch
    assert all(float(line.split()[-1]) > 0 for line in lines)


@pytest.mark.parametrize("kind", weightings.KINDS)
def test_kinds_are_what_they_are_named(kind: str) -> None:
    G = weightings.gram(kind, 6)
    assert G.shape == (6, 6)
    rank = {"dependent": 3, "duplicate": 3, "zero": 5}.get(kind, 6)
    values = torch.linalg.eigvalsh(G)
    assert int((values > 1e-10 * values[-1]).sum()) == rank
