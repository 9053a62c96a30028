"""The check for GPU machines, walked through on the CPU: stages, files, exit status."""

from __future__ import annotations

import ast
import csv
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import environment, gpu_check
from benchmarks.gpu_check import Stage
from mtu_fast._ops import _library

NAMES = ["environment", "build", "tests", "sanitizer", "ops", "capture", "step cost", "tune"]
LARGEST = 16 << 20


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.mark.skipif(
    _library.EXTENSION is None, reason="the build stage of the dry run takes over what is built"
)
def test_the_dry_run_goes_through_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path / "new")]) == 0
    files = {path.name: path for path in (tmp_path / "new").iterdir()}
    assert set(files) == {
        "gpu_check.log", "summary.json", "tests_gpu.xml", "tests_ops.xml", "ops.csv", "step_cost.json",
        "tuned.py",
    }  # fmt: skip
    assert all(0 < path.stat().st_size < LARGEST for path in files.values())
    summary = json.loads(files["summary.json"].read_text())
    assert [(each["stage"], each["status"]) for each in summary] == [
        (name, "passed") for name in NAMES
    ]
    with files["ops.csv"].open() as file:
        assert any(
            row["implementation"] == "kernel" and float(row["seconds"]) > 0
            for row in csv.DictReader(file)
        )
    assert json.loads(files["step_cost.json"].read_text())["cases"][0]["model"] == "mlp"
    log = files["gpu_check.log"].read_text()
    assert f"torch {torch.__version__}" in log and "served by" in log and "right: errs" in log
    printed = capsys.readouterr().out
    assert all(f"\n{name}" in printed for name in NAMES)


def test_the_time_adds_up_and_every_stage_is_for_the_gpu(tmp_path: Path) -> None:
    real = gpu_check.stages(tmp_path, dry=False)
    assert [stage.name for stage in real] == NAMES
    assert sum(stage.seconds for stage in real) + 10 <= 540
    for stage in real[4:]:
        assert all("--quick" not in command for command in stage.commands)
    # blocks are tuned on a GPU or not at all
    assert all("cuda" in command for stage in real[4:-1] for command in stage.commands)


def launched(file: Path) -> set[str]:
    """The functions of a file of Triton kernels that are launched: `kernel[grid](...)`."""
    calls = [
        node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
    ]
    names = {
        f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)
    }
    return names - {"dict"}


def test_the_sanitizer_watches_every_kernel_of_ours_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = set().union(*(launched(file) for file in (gpu_check.ROOT / "kernels").glob("*.py")))
    assert {"_row_gram", "_ghost", "_collect", "_double"} <= ours
    assert set(gpu_check.kernel_names()) == {"mtu_fast", *ours}
    assert (
        "namespace mtu_fast::cuda"
        in (gpu_check.ROOT / "csrc" / "cuda" / "gram_schmidt.cuh").read_text()
    )
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    (stage,) = (
        stage for stage in gpu_check.stages(tmp_path, dry=False) if stage.name == "sanitizer"
    )
    tools = [command[: command.index("-m")] for command in stage.commands]
    assert [tool[tool.index("--tool") + 1] for tool in tools] == ["memcheck", "racecheck"]
    for tool in tools:
        filters = {value for option, value in pairwise(tool) if option == "--kernel-name"}
        assert filters == {f"kns={name}" for name in gpu_check.kernel_names()}
    assert "--report-api-errors no" in " ".join(tools[0])


@pytest.mark.parametrize("said", ["", "abc"])
def test_the_copy_says_which_commit_it_is_of(said: str, tmp_path: Path) -> None:
    """It has no git of its own."""
    tree = gpu_check.copy_of_the_tree(tmp_path, said, built=True)
    expected = said or environment.stamp()
    if expected:
        assert (tree / "COMMIT").read_text() == expected + "\n"
        assert expected.rstrip("+") == (said or environment.commit())
    assert not (tree / ".git").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "new")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_bad_stage_is_reported_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        Stage("good", 20, (python("print('fine')"), python("print('beside it')"))),
        Stage(
            "bad", 20, (python("print('why')"), python("raise SystemExit(3)"), ("no-such-program",))
        ),
        Stage("absent", 1, (), "the tool is not here"),
        Stage("last", 20, (python("import mtu_fast; print(mtu_fast.__file__)"),)),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda out, dry: stages)
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == 1
    summary = {each["stage"]: each for each in json.loads((tmp_path / "summary.json").read_text())}
    assert {name: each["status"] for name, each in summary.items()} == {
        "good": "passed", "bad": "FAILED", "absent": "SKIPPED", "last": "passed",
    }  # fmt: skip
    assert summary["bad"]["note"] == "command 2: exit status 3, command 3: exit status 127"
    log = (tmp_path / "gpu_check.log").read_text()
    assert "fine" in log and "beside it" in log and "why" in log
    assert "/tree/mtu_fast/__init__.py" in log  # not the installed one
    assert "SKIPPED" in capsys.readouterr().out


def test_a_stage_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    ignoring = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "print('here', flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    outcomes = gpu_check.check(
        [Stage("slow", 2, (python(ignoring),)), Stage("next", 20, (python("1"),))], tmp_path
    )
    assert [each.status for each in outcomes] == ["TOO LONG", "passed"]
    assert time.monotonic() - start < 30
    assert "here" in (tmp_path / "gpu_check.log").read_text()


def test_the_log_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LOG_OF_A_STAGE", 1000)
    gpu_check.check([Stage("loud", 20, (python("print('x' * 100_000); print('end')"),))], tmp_path)
    log = (tmp_path / "gpu_check.log").read_text()
    assert len(log) < 2000 and "end" in log
