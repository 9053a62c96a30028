"""The step-cost benchmark on tiny models: it runs, its parts measure what they say, wrong input is told apart."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import step_cost
from benchmarks.measure import BEFORE, Times, interleaved, peak_memory
from benchmarks.models import MODELS, build
from benchmarks.peers import base
from mtu_fast._graph.plans import Schedule


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on several threads mostly wait for one another where other work runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def allocate(mib: str) -> Callable[[], object]:
    """A callable that holds `mib` MiB while it runs; what it loads before must not count."""
    loaded = bytearray(32 << 20)
    return lambda: len(bytearray(int(mib) << 20)) + len(loaded)


def test_a_quick_run_prints_and_writes_every_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "step_cost.json"
    step_cost.main([
        "--quick",
        "--no-memory",
        "--models",
        "mlp",
        "--repeats",
        "2",
        "--json",
        str(path),
    ])
    found = json.loads(path.read_text())
    assert [(c["model"], c["tasks"], c["rows"]) for c in found["cases"]] == [
        ("mlp", 1, 8),
        ("mlp", 3, 24),
    ]
    for case in found["cases"]:
        assert tuple(case["steps"]) == step_cost.STEPS
        assert case["steps"]["plain"]["ratio"] == 1.0
        assert all(s["ms"] > 0 and s["peak_mib"] is None for s in case["steps"].values())
    assert {"torch", "threads", "cpu", "date", "commit"} <= set(found)
    lines = capsys.readouterr().out.strip().splitlines()[-8:]
    assert len({len(line) for line in lines}) == 1
    assert all(any(f"| {name} " in line for line in lines) for name in step_cost.STEPS)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_both_whole_steps_leave_the_same_grad(model: str, tasks: int) -> None:
    case = build(model, tasks, quick=True, dtype=torch.float64)
    assert step_cost.disagreement(case, step_cost.steps(case)) < 1e-10
    assert all(p.grad is None for p in case.model.parameters())


def test_a_wrong_step_gets_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    right = base.weights
    monkeypatch.setattr(base, "weights", lambda *args: 1.25 * right(*args))
    with pytest.raises(SystemExit, match=r"differ by 2\.0e-01 of its norm, expected at most 1e-03"):
        step_cost.main(["--quick", "--no-memory", "--models", "mlp", "--tasks", "1"])


def test_weights_orthogonalise_against_every_retain_row() -> None:
    torch.manual_seed(0)
    J, forget = torch.randn(12, 50, dtype=torch.float64), torch.arange(12) % 4 == 0
    w = base.weights(J @ J.T, forget, tasks=3)
    Q, _ = torch.linalg.qr(J[~forget].T)
    f = J[forget].sum(0)  # one forget row a task: the mean of each, summed over tasks
    expected = 0.5 * J[~forget].sum(0) / 3 - 0.5 * (f - Q @ (Q.T @ f))
    torch.testing.assert_close(J.T @ w, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "lenet"], "invalid choice: 'lenet'"),
        (["--repeats", "0"], "must be at least 1"),
        (["--tasks", "1", "0"], "must be at least 1"),
        (["--tasks", "three"], "invalid int value: 'three'"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        step_cost.main(arguments)
    assert message in capsys.readouterr().err


def test_build_names_what_it_does_not_know() -> None:
    with pytest.raises(
        ValueError, match="unknown model 'lenet'; there are mlp, transformer, resnet"
    ):
        build("lenet", 1)
    with pytest.raises(ValueError, match="tasks is 0"):
        build("mlp", 0)


def test_rounds_interleave_and_each_begins_with_another() -> None:
    calls: list[str] = []
    found = interleaved({name: partial(calls.append, name) for name in "abc"}, repeats=3, warmup=1)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(times.rounds) for name, times in found.items()} == {"a": 3, "b": 3, "c": 3}
    with pytest.raises(ValueError, match="repeats is 0"):
        interleaved({"a": list}, repeats=0)


def test_times_are_those_of_the_callable() -> None:
    found = interleaved(
        {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, repeats=3
    )
    assert found["short"].median >= 2 and found["long"].median >= 20


def test_ratios_pair_the_rounds() -> None:
    slow, base = Times((20.0, 40.0, 60.0)), Times((10.0, 20.0, 20.0))
    assert slow.ratio(base) == (2.0, 0.25)
    assert (slow.median, slow.spread) == (40.0, 10.0)
    assert Times((5.0,)).spread == 0.0


def test_peak_memory_counts_what_the_call_holds_and_nothing_loaded_before() -> None:
    peak = peak_memory("tests.benchmarks.test_step_cost:allocate", "64")
    assert peak == pytest.approx(64, abs=2)  # the kernel counts resident pages in batches


def test_the_call_whose_memory_is_measured_is_the_first_without_a_check() -> None:
    schedule = Schedule()
    assert [schedule.due() for _ in range(BEFORE + 1)] == [True] * BEFORE + [False]


def test_peak_memory_hands_on_the_error_of_the_process() -> None:
    with pytest.raises(RuntimeError, match="unknown model 'lenet'"):
        peak_memory("benchmarks.step_cost:prepare", "lenet", "1", "plain", "True")
