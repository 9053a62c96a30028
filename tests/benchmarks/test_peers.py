"""Every way to the OrthoGrad step leaves the same G and `.grad`; who cannot gets a row that says why."""

from __future__ import annotations

import csv
from importlib import util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import plot_peers
from benchmarks.models import MODELS, Case, build
from benchmarks.peers import run
from benchmarks.peers.base import Peer, Steps
from benchmarks.peers.table import table
from benchmarks.peers.ways import PEERS, ours
from tests.helpers.truth import relative_error

NEEDS = {"TorchJD autogram": "torchjd", "Opacus": "opacus", "BackPACK": "backpack"}
REFUSED = {  # what their own documents say, or their errors
    "TorchJD autogram": {"dense": "batchnorm"}, "Opacus": {"dense": "doesn't currently support"},
    "BackPACK": dict.fromkeys(("transformer", "resnet", "vit", "depthwise"), "no grad_batch"),
}  # fmt: skip
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of the packages
]


def installed(way: str) -> None:
    if way in NEEDS and util.find_spec(NEEDS[way]) is None:
        pytest.skip(f"needs {NEEDS[way]}")


def grad(case: Case) -> Tensor:
    return torch.cat([p.grad.flatten() for p in case.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", [way for way in PEERS if way != "mtu_fast"])
def test_everyone_finds_the_same(way: str, model: str, tasks: int) -> None:
    installed(way)
    mine, theirs = (
        build(model, tasks, quick=True, smooth=True, dtype=torch.float32) for _ in range(2)
    )
    expected = ours(mine)
    if message := REFUSED.get(way, {}).get(model):
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=message):
            PEERS[way].prepare(theirs).step()
        return
    steps = PEERS[way].prepare(theirs)
    if steps.gram is not None and expected.gram is not None:
        assert relative_error(steps.gram().double(), expected.gram()) <= 1e-4
    for _ in range(2):
        expected.step()
        steps.step()
        assert relative_error(grad(theirs), grad(mine)) <= 1e-4


def test_rows_say_what_was_measured_or_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(case: Case) -> Steps:
        gram, step = ours(case)
        assert gram is not None
        return Steps(lambda: 1.1 * gram(), step)

    def broken(case: Case) -> Steps:
        raise NotImplementedError("no such layer")

    monkeypatch.setitem(run.WAYS, "Opacus", Peer(wrong))
    monkeypatch.setitem(run.WAYS, "BackPACK", Peer(broken, "no-such-package"))
    path = tmp_path / "peers.csv"
    arguments = [
        "--quick",
        "--models",
        "mlp",
        "--tasks",
        "1",
        "--samples",
        "6",
        "--repeats",
        "2",
        "--no-memory",
    ]
    arguments += ["--csv", str(path), "--ways", "mtu_fast", "Opacus", "BackPACK", "vmap(grad), QR"]
    for _ in range(2):
        run.main(arguments)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 10 and rows[0]["way"] == "plain" and float(rows[0]["step_ratio"]) == 1
    by_way = {row["way"]: row for row in rows}
    assert (
        float(by_way["mtu_fast"]["gram_ratio"]) > 0
        and float(by_way["vmap(grad), QR"]["step_ms"]) > 0
    )
    assert by_way["vmap(grad), QR"]["gram_ms"] == "" and by_way["vmap(grad), QR"]["rows"] == "6"
    assert (
        by_way["Opacus"]["why_not"].startswith("G is wrong by 1.0e-01")
        and not by_way["Opacus"]["step_ms"]
    )
    assert by_way["BackPACK"]["why_not"] == "NotImplementedError: no such layer"
    out = capsys.readouterr().out
    assert "no such layer" in out and "6 rows x 27,562" in out


def test_what_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LIMIT", 1e-12)
    what = run.What("mlp", 1, 4, True)
    assert run.why_not(what, "loop over samples", run.result(what, "mtu_fast")).startswith(
        "J alone takes 0.0 of"
    )


def test_the_newest_times_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "peers.csv"
    empty = dict.fromkeys(run.COLUMNS, "")
    for ratio in (2.0, 1.5):
        run.append(path, [
            empty | {"model": "mlp", "tasks": tasks, "samples": n, "way": "mtu_fast", "step_ms": 1, "step_ratio": ratio}
            for tasks in (1, 3) for n in (4, 16)
        ])  # fmt: skip
    found = plot_peers.plot_peers(path, tmp_path / "plots")
    assert [file.name for file in found] == ["peers_1_task.png", "peers_3_tasks.png"]
    assert all(file.stat().st_size > 5_000 for file in found)
    (tmp_path / "empty.csv").write_text(",".join(run.COLUMNS) + "\n")
    with pytest.raises(ValueError, match="holds no times"):
        plot_peers.plot_peers(tmp_path / "empty.csv", tmp_path)


def test_a_file_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "peers.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns a,b, expected model,tasks"):
        run.append(path, [])
    assert path.read_text() == "a,b\n1,2\n"


def test_the_table_has_the_newest_of_each(tmp_path: Path) -> None:
    def row(model: str, way: str, time: str, memory: str) -> dict[str, str]:
        return {
            "model": model,
            "tasks": "1",
            "samples": "4",
            "way": way,
            "step_ratio": time,
            "step_mib_ratio": memory,
        }

    rows = [
        row("mlp", "mtu_fast", "1.5", "1"),
        row("mlp", "Opacus", "", ""),
        row("mlp", "mtu_fast", "1.456", "12.34"),
    ]
    lines = table(rows).splitlines()
    assert lines[0].startswith("| model | tasks | N | mtu_fast |") and len(lines) == 3
    assert lines[2].startswith("| mlp | 1 | 4 | 1.46, 12 | - |") and lines[2].count("|") == lines[
        0
    ].count("|")
