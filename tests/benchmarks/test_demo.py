"""The unlearning demo in small: its batches, its search, its costs' two sides, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from benchmarks import demo
from benchmarks.data import concat
from benchmarks.scenes import TASKS, Net, Scenes, scene_scores

TINY = demo.Setting(
    sizes={"train": 48, "validation": 30, "test": 30}, forget=8, epochs=12, batch=8, forget_batch=4, steps=4, width=8,
    rounds=1, memory=False, protective=((0.5, 0.1), (0.7, 0.1)), ascent=((0.0, 0.02), (0.0, 0.05)),
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> dict[str, Scenes]:
    return demo.split(TINY, 0)


@pytest.fixture
def bar() -> Iterator[Any]:
    with tqdm(disable=True) as quiet:
        yield quiet


@pytest.fixture(scope="module")
def trained(data: dict[str, Scenes]) -> Net:
    with tqdm(disable=True) as quiet:
        return demo.train(concat(data["forget"], data["retain"]), TINY, 0, quiet)


def test_splits_share_no_image(data: dict[str, Scenes]) -> None:
    assert {name: len(scenes) for name, scenes in data.items()} == {
        "forget": 8, "retain": 40, "validation": 30, "test": 30
    }  # fmt: skip
    used = torch.cat([scenes.source.flatten() for scenes in data.values()])
    assert len(used.unique()) == len(used)


@pytest.mark.parametrize("targets", [TASKS, ("left",)])
def test_a_batch_forgets_only_the_targets_of_forget_scenes(data: dict[str, Scenes], targets: tuple[str, ...]) -> None:
    batch, mask = demo.draw(data, targets, TINY, torch.Generator().manual_seed(0))
    gone = set(data["forget"].source[:, 0].tolist())
    is_forget = torch.tensor([int(n) in gone for n in batch.source[:, 0]])
    assert len(batch) == 12 and int(is_forget.sum()) == 4
    for task in TASKS:
        assert torch.equal(mask[task], is_forget if task in targets else torch.zeros(12, dtype=torch.bool))


def test_labels_that_are_absent_do_not_train(data: dict[str, Scenes], bar: Any) -> None:
    scenes = data["retain"][:8]
    setting, nobody = demo.Setting(epochs=1, width=8), torch.zeros(8, dtype=torch.bool)
    torch.manual_seed(0)
    start = Net(8)
    trained = demo.train(scenes, setting, 0, bar, {"left": nobody})
    assert torch.equal(trained.left.weight, start.left.weight)
    assert not torch.equal(trained.right.weight, start.right.weight)


@pytest.mark.parametrize("request_name", list(demo.REQUESTS))
@pytest.mark.parametrize("method", list(demo.METHODS))
def test_engine_and_reference_take_the_same_step(
    data: dict[str, Scenes], trained: Net, method: str, request_name: str
) -> None:
    model = Net(TINY.width).double()
    model.load_state_dict(trained.state_dict())
    doubled = {name: Scenes(s.image.double(), s.labels, s.source) for name, s in data.items()}
    directions = []
    for implementation in ("fast", "reference"):
        demo.step(implementation, method, request_name, model, doubled, TINY, 0)()
        directions.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert directions[0].norm() > 0
    assert (directions[0] - directions[1]).norm() <= 1e-8 * directions[1].norm()


def test_a_run_stops_at_the_level_and_says_whether_it_did(data: dict[str, Scenes], trained: Net, bar: Any) -> None:
    arguments = (trained, data, TASKS, "Ascent", 0.0, 0.02)
    at_once = demo.unlearn(*arguments, level=1.0, setting=TINY, seed=0, bar=bar)
    assert (at_once.reached, at_once.steps, len(at_once.history)) == (True, 0, 1)
    never = demo.unlearn(*arguments, level=-1.0, setting=TINY, seed=0, bar=bar)
    assert (never.reached, never.steps) == (False, 4)
    assert [entry["step"] for entry in never.history] == [0, 2, 4]
    assert never.history[0]["forget"] == scene_scores(trained, data["forget"])
    assert never.history[-1]["retain"] == scene_scores(never.model, data["retain"])


def test_the_search_tries_the_whole_table_and_puts_the_best_first(
    data: dict[str, Scenes], trained: Net, bar: Any
) -> None:
    runs = demo.search(trained, data, ("left",), "OrthoGrad", TINY, 0, bar)
    assert sorted((run.alpha, run.lr) for run in runs) == sorted(TINY.protective)
    keys = [(not run.reached, run.uis_validation) for run in runs]
    assert keys == sorted(keys)


def test_every_method_gets_equally_many_settings() -> None:
    for setting in (demo.Setting(), demo.QUICK):
        assert len({len(setting.grid(name)) for name in demo.METHODS}) == 1


def test_the_demo_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)
    demo.main(["--quick", "--seed", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "unlearning.json").read_text())
    assert result["seed"] == 1 and set(result["requests"]) == {"full", "partial"}
    assert (tmp_path / "unlearning.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    sections = printed.split("-task: forget from ")[1:]
    for section, block in zip(sections, result["requests"].values(), strict=True):
        assert section.startswith(", ".join(block["targets"]))
        assert list(block["models"]) == ["original", "retrained", *demo.METHODS]
        for name, row in block["models"].items():
            assert all(0 <= a <= 1 for scores in row["scores"].values() for a in scores.values())
            assert f"{row['uis']:.1f}" in next(line for line in section.splitlines() if line.startswith(name))
        for name in demo.METHODS:
            row = block["models"][name]
            assert row["history"][-1]["forget"] == row["scores"]["forget"]
            assert row["ms"]["fast"] > 0 and row["ms"]["reference"] > 0 and row["parameter_shift"] > 0
            assert len(row["tried"]) == 2 and row["tried"][0] == row["chosen"]
        assert block["models"]["retrained"]["mean_gap"] == 0 and block["models"]["retrained"]["tow"] == 1
