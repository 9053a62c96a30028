"""This tree against another revision: the base's own files are timed, ratios are what they should be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.measure import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="needs git and the repository",
)


def test_a_tree_against_its_own_commit(capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(["HEAD", "--quick", "--models", "mlp", "--tasks", "1", "--repeats", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[2].split()[0] for line in lines[1:]] == [
        "plain",
        "gram",
        "orthograd",
        "vmap",
    ]
    assert all(float(line.split()[-2]) > 0 and float(line.split()[-1]) > 0 for line in lines[1:])
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "/base" not in listed


def test_each_server_runs_its_own_tree(tmp_path: Path) -> None:
    """A tree whose steps sleep is the slower one."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "models.py").write_text("def build(*arguments):\n    return 0.2\n")
    (tmp_path / "benchmarks" / "step_cost.py").write_text(
        "import time\ndef steps(s):\n    return {'plain': lambda: time.sleep(s), 'old': lambda: None}\n"
    )
    found = compare.measure((ROOT, tmp_path), "mlp", 1, 3, quick=True)
    assert list(found) == ["plain"]
    ours, base = found["plain"]
    assert base.median >= 200 and ours.ratio(base)[0] < 1


def test_a_tree_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 1; its error is above"):
        compare.Server(tmp_path, "mlp", 1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-revision"], "no-such-revision ended with"),
        (["HEAD", "--repeats", "0"], "take numbers from 1"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err
