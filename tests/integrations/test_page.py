"""The page on loops: its blocks run from top to bottom, and each line of its table is a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.integrations_page import EXACT, Line, rewritten, table
from tests.integrations.conftest import check
from tests.integrations.marks import marks

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "integrations.md").read_text()
LINES = table(TEXT)

pytestmark = marks(
    "ignore::UserWarning:lightning", "ignore:.*(num_workers|logging interval|isinstance).*"
)


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


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.expectation}, {line.loop}")
def test_a_line_of_the_table_is_a_test(line: Line) -> None:
    """That its bound and error are the test's own, the test says itself (conftest.py)."""
    file, name = line.node.split("::")
    text = (TESTS.parent / file).read_text()
    tests = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert name in tests
    assert re.match("yes|refused", line.works) and int(line.lines) <= 5
    if line.is_measured:
        assert float(line.error) <= float(line.allowed)
        # others than those of this folder are looked at by nobody else
        assert file.startswith("tests/integrations/") or line.allowed in ast.unparse(tests[name])
    else:
        assert line.error == line.allowed
    if line.allowed == EXACT:
        assert "torch.equal(" in ast.unparse(tests[name])


def test_an_error_that_grew_a_bound_that_was_widened_and_a_test_that_stopped_measuring() -> None:
    line = Line("", "", "yes", "1", "1.0e-04", "1e-02", "`integrations/a.py::b`")
    check([line], [(2e-4, 1e-2)])
    check([line._replace(error="–", allowed="–")], [])
    for held in ([], [(2e-4, 1e-1)], [(2e-3, 1e-2)], [(2e-4, 1e-2), (2e-4, 2e-2)]):
        with pytest.raises(AssertionError, match="the page says"):
            check([line], held)


def test_errors_are_written_into_the_lines() -> None:
    line = Line("a", "b", "yes", "1", "1.0e-04", "1e-02", "`integrations/a.py::b`")
    exact = line._replace(error="0", allowed="0")
    page = f"words\n{line.text}\n{exact.text}\n"
    found = rewritten(page, {(line.node, 1e-2): 3.14e-5})
    assert table(found) == [line._replace(error="3.1e-05"), exact]
    with pytest.raises(ValueError, match="no error held to 1e-02"):
        rewritten(page, {(line.node, 1e-3): 3.14e-5})


def test_the_table_is_there() -> None:
    assert len(LINES) >= 30 and {line.loop.split(",")[0] for line in LINES} == {
        "plain",
        "Trainer",
        "Accelerate",
        "Lightning",
        "`mtu.unlearn`",
    }
