"""Every block of the docs runs: a page's from top to bottom, after the quickstart's first block; commands exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._functorch import config as functorch

import mtu_fast as mtu
from benchmarks import tables
from mtu_fast.rules import RULES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted(DOCS.rglob("*.md"))
SOURCES = ("mtu_fast", "kernels", "tests", "benchmarks", "examples")
SHELL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "benchmarks").glob("*.md"), *PAGES]

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(page: Path, language: str) -> list[str]:
    """The page's blocks in one language, in order, each at its line of the page."""
    text = page.read_text()
    found = [match for match in BLOCK.finditer(text) if match[1] == language]
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in found]


def run(code: str, page: Path, names: dict[str, Any]) -> None:
    exec(compile(code, str(page.relative_to(ROOT)), "exec", dont_inherit=True), names)


RUNNING = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.name == "examples.md":
        pytest.skip("whole files, which test_examples runs")
    monkeypatch.chdir(tmp_path)
    known = dict(RULES)
    names: dict[str, Any] = {"__name__": page.stem}
    quickstart = DOCS / "quickstart.md"
    start = [] if page == quickstart else blocks(quickstart, "python")[:1]
    try:
        with functorch.patch(donated_buffer=functorch.donated_buffer):  # put back after
            for code in [*start, *blocks(page, "python")]:
                run(code, page, names)
    finally:
        RULES.clear()
        RULES.update(known)
    assert all(bool(torch.isfinite(p).all()) for p in names["model"].parameters())


def test_what_the_audit_page_writes_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    page = DOCS / "how-to" / "audit.md"
    for code in [blocks(DOCS / "quickstart.md", "python")[0], *blocks(page, "python")]:
        run(code, page, names)
    assert (tmp_path / "audit.html").stat().st_size > 10_000


# ---- commands ------------------------------------------------------------------------------------


def commands() -> list[str]:
    found = [
        line.split("  #")[0].strip()
        for page in SHELL
        for code in blocks(page, "bash")
        for line in code.splitlines()
    ]
    return sorted({line for line in found if line and not line.startswith("#")})


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def extras() -> set[str]:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    return set(re.findall(r"^(\w+) = \[", section.split("\n[")[0], re.MULTILINE))


def check_module(module: str) -> None:
    assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("command", commands())
def test_a_command_exists(command: str) -> None:
    words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
    if words[0] == "make":
        assert set(words[1:]) <= make_targets()
    elif words[0] == "pip":
        assert words[1] == "install"
        for named in re.findall(r"\[([\w,]+)\]", command):
            assert set(named.split(",")) <= extras()
    elif words[:2] == ["git", "clone"] or words[0] == "cd":
        return
    else:
        assert words[0] in ("python", "pytest", "torchrun")
        if words[:2] == ["python", "-m"]:
            check_module(words[2])
        else:
            assert all((ROOT / word).exists() for word in words[1:] if "/" in word)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", SHELL, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_names_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    files = {path.name for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    said = {Path(name).name for name in re.findall(r"`([\w/.]+\.py)`", text)}
    assert said <= files | {"setup.py"}, said - files
    public = set(re.findall(r"\bmtu\.(\w+)", text))
    assert all(hasattr(mtu, name) for name in public), public


# ---- what is said twice --------------------------------------------------------------------------


def test_tables_are_what_the_results_say() -> None:
    assert tables.main(["--check"]) == 0


def test_the_navigation_names_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    named = set(re.findall(r"([\w/-]+\.md)$", nav, re.MULTILINE))
    assert named == {str(page.relative_to(DOCS)) for page in PAGES}


def test_the_page_of_examples_includes_every_file() -> None:
    text = (DOCS / "examples.md").read_text()
    included = re.findall(r'^    --8<-- "(.*)"$', text, re.MULTILINE)
    files = sorted((ROOT / "examples").glob("*.py"))
    assert sorted(included) == [f"examples/{file.name}" for file in files]


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "reference" / "methods" / "index.html").exists()


def test_the_reference_has_every_public_name() -> None:
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    said = set(re.findall(r"^::: mtu_fast\.([\w.]+)$", text, re.MULTILINE))
    constants = {"FORGET", "MEMORY", "RESTING", "RETAIN", "SUBSPACE"}  # described with Roles
    assert set(mtu.__all__) - constants <= {name.split(".")[-1] for name in said}
