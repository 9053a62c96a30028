"""The page on loops: its blocks run from top to bottom, and each line of its table is a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "integrations.md").read_text()
LINES = [line for line in TEXT.splitlines() if line.startswith("| ") and "::" in line]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|pin_memory|logging interval|isinstance).*"),
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def block_of(heading: str) -> str:
    """The code under a heading."""
    part = TEXT.partition(f"## {heading}\n")[2]
    return part.partition("```py\n")[2].partition("```")[0]


SHARED = TEXT.partition("```py\n")[2].partition("```")[0]
ALONE = ["Gradient accumulation", "Trainer of transformers", "Compiled modules"]


@pytest.mark.parametrize("heading", ALONE)
def test_a_block_runs(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(heading, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("heading", "package"), [("Accelerate", "accelerate"), ("Lightning", "lightning")]
)
def test_a_block_after_that_on_accumulation_runs(
    heading: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    run(heading, tmp_path, monkeypatch, before=block_of(ALONE[0]))


def run(heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch, before: str = "") -> None:
    monkeypatch.chdir(folder)
    code = block_of(heading)
    assert code
    names: dict[str, Any] = {"__name__": "page"}
    for each in (SHARED, before, code):
        exec(compile(each, heading, "exec", dont_inherit=True), names)
    assert all(bool(torch.isfinite(p).all()) for p in names["model"].parameters())


@pytest.mark.parametrize("line", LINES, ids=lambda line: cells(line)[0] + ", " + cells(line)[1])
def test_a_line_of_the_table_is_a_test(line: str) -> None:
    _, _, works, lines, error, allowed, named = cells(line)
    file, name = named.strip("`").split("::")
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert re.match("yes|refused", works) and int(lines) <= 5
    if error != "–":
        assert float(error) <= float(allowed)


def test_the_table_is_there() -> None:
    assert len(LINES) >= 30 and {cells(line)[1].split(",")[0] for line in LINES} == {
        "plain",
        "Trainer",
        "Accelerate",
        "Lightning",
        "`mtu.unlearn`",
    }
