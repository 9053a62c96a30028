"""The examples of several processes run as their docstrings say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*program: str, ranks: int = 2) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *program]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_step() -> None:
    said = run("examples/several_processes.py")
    assert "2 ranks, 16 rows" in said
    assert "parameters are equal on all ranks" in said


def test_unlearning_resumes_on_another_number_of_processes(tmp_path: Path) -> None:
    program = "examples/sharded_unlearning.py", str(tmp_path / "run.pt")
    said = run(*program)
    (forgotten,) = re.findall(r"forgotten ([\d.]+) -> ([\d.]+)", said)
    assert said.startswith("2 processes") and float(forgotten[1]) > float(forgotten[0])
    again = run(*program, ranks=1)  # the run is over: what was written is read
    assert again.startswith("1 processes") and again.splitlines()[1:] == said.splitlines()[1:]
