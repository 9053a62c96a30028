"""The unlearning demo in small: its batches, its search, its costs' two sides, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from benchmarks import demo
from benchmarks.data import Samples, concat
from benchmarks.protocol import Protocol, draw, search, unlearn
from benchmarks.scenes import TASKS, Net, scene_scores
from benchmarks.training import train

TINY = demo.Setting(
    Protocol(epochs=12, batch=8, retain_batch=8, forget_batch=4, steps=4, grids={
        "protective": ((0.5, 0.1), (0.7, 0.1)), "ascent": ((0.0, 0.02), (0.0, 0.05))
    }),
    sizes={"train": 48, "validation": 30, "test": 30}, forget=8, width=8, rounds=1, memory=False,
)  # fmt: skip
DIGITS = demo.problem(TINY.width)


def quiet(_count: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def data() -> dict[str, Samples]:
    return demo.split(TINY, 0)


@pytest.fixture(scope="module")
def trained(data: dict[str, Samples]) -> nn.Module:
    return train(DIGITS, data["train"], TINY.protocol, 0, quiet)


def test_splits_share_no_image(data: dict[str, Samples]) -> None:
    assert {name: len(scenes) for name, scenes in data.items()} == {
        "train": 48, "forget": 8, "retain": 40, "validation": 30, "test": 30
    }  # fmt: skip
    assert torch.equal(concat(data["forget"], data["retain"]).source, data["train"].source)
    used = torch.cat([scenes.source.flatten() for name, scenes in data.items() if name != "train"])
    assert len(used.unique()) == len(used)


@pytest.mark.parametrize("targets", [TASKS, ("left",)])
def test_a_batch_forgets_only_the_targets_of_forget_scenes(
    data: dict[str, Samples], targets: tuple[str, ...]
) -> None:
    batch, mask = draw(DIGITS, data, targets, TINY.protocol, torch.Generator().manual_seed(0))
    gone = set(data["forget"].source[:, 0].tolist())
    is_forget = torch.tensor([int(n) in gone for n in batch.source[:, 0]])
    assert len(batch) == 12 and int(is_forget.sum()) == 4
    for task in TASKS:
        assert torch.equal(
            mask[task], is_forget if task in targets else torch.zeros(12, dtype=torch.bool)
        )


def test_labels_that_are_absent_do_not_train(data: dict[str, Samples]) -> None:
    scenes, nobody = data["retain"][:8], torch.zeros(8, dtype=torch.bool)
    torch.manual_seed(0)
    start = Net(8)
    trained = train(DIGITS, scenes, Protocol(epochs=1), 0, quiet, {"left": nobody})
    assert isinstance(trained, Net)
    assert torch.equal(trained.left.weight, start.left.weight)
    assert not torch.equal(trained.right.weight, start.right.weight)


@pytest.mark.parametrize("request_name", list(demo.REQUESTS))
@pytest.mark.parametrize("method", list(demo.ENTRIES))
def test_engine_and_reference_take_the_same_step(
    data: dict[str, Samples], trained: nn.Module, method: str, request_name: str
) -> None:
    model = Net(TINY.width).double()
    model.load_state_dict(trained.state_dict())
    doubled = {name: Samples(s.image.double(), s.labels, s.source) for name, s in data.items()}
    directions = []
    for implementation in ("fast", "reference"):
        demo.step(implementation, method, request_name, model, doubled, TINY, 0)()
        directions.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert directions[0].norm() > 0
    assert (directions[0] - directions[1]).norm() <= 1e-8 * directions[1].norm()


def test_a_run_stops_at_the_level_and_says_whether_it_did(
    data: dict[str, Samples], trained: nn.Module
) -> None:
    arguments = (DIGITS, trained, data, TASKS, demo.ENTRIES["Ascent"], 0.0, 0.02)
    at_once = unlearn(
        *arguments, level=dict.fromkeys(TASKS, 1.0), protocol=TINY.protocol, seed=0, tick=quiet
    )
    assert (at_once.reached, at_once.steps, len(at_once.history)) == (True, 0, 1)
    never = unlearn(
        *arguments, level=dict.fromkeys(TASKS, -1.0), protocol=TINY.protocol, seed=0, tick=quiet
    )
    assert (never.reached, never.steps) == (False, 4)
    assert [entry["step"] for entry in never.history] == [0, 2, 4]
    assert never.history[0]["forget"] == scene_scores(trained, data["forget"])
    assert never.history[-1]["retain"] == scene_scores(never.model, data["retain"])


def test_the_search_tries_the_whole_table_and_puts_the_best_first(
    data: dict[str, Samples], trained: nn.Module
) -> None:
    runs = search(
        DIGITS, trained, data, ("left",), demo.ENTRIES["OrthoGrad"], TINY.protocol, 0, quiet
    )
    assert sorted((run.alpha, run.lr) for run in runs) == sorted(TINY.protocol.grids["protective"])
    keys = [(not run.reached, run.uis_validation) for run in runs]
    assert keys == sorted(keys)


def test_every_method_gets_equally_many_settings() -> None:
    for setting in (demo.Setting(), demo.QUICK):
        grids = [setting.protocol.grids[entry.family] for entry in demo.ENTRIES.values()]
        assert len({len(grid) for grid in grids}) == 1


def test_the_demo_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)
    demo.main(["--quick", "--seed", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "unlearning.json").read_text())
    assert result["seed"] == 1 and set(result["requests"]) == {"full", "partial"}
    assert (tmp_path / "unlearning.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (tmp_path / "unlearning.html").read_text(encoding="utf-8")
    for request, block in result["requests"].items():
        audited = mtu.Audit.from_json(tmp_path / f"audit_{request}.json").data
        found, chosen = audited["scores"], block["models"]["OrthoGrad"]
        assert (
            found["unlearned"] == chosen["scores"]
            and found["retrained"] == block["models"]["retrained"]["scores"]
        )
        assert (
            audited["uis"]["unlearned"] == chosen["uis"]
            and audited["request"]["targets"] == block["targets"]
        )
        assert audited["history"] == chosen["history"] and audited["verdict"]["headline"] in page
    sections = printed.split("-task: forget from ")[1:]
    for section, block in zip(sections, result["requests"].values(), strict=True):
        assert section.startswith(", ".join(block["targets"]))
        assert list(block["models"]) == ["original", "retrained", *demo.ENTRIES]
        for name, row in block["models"].items():
            assert all(0 <= a <= 1 for scores in row["scores"].values() for a in scores.values())
            assert f"{row['uis']:.1f}" in next(
                line for line in section.splitlines() if line.startswith(name)
            )
        for name in demo.ENTRIES:
            row = block["models"][name]
            assert row["history"][-1]["forget"] == row["scores"]["forget"]
            assert (
                row["ms"]["fast"] > 0 and row["ms"]["reference"] > 0 and row["parameter_shift"] > 0
            )
            assert len(row["tried"]) == 2 and row["tried"][0] == row["chosen"]
        assert (
            block["models"]["retrained"]["mean_gap"] == 0
            and block["models"]["retrained"]["tow"] == 1
        )
