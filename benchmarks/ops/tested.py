"""Speed counts for ops that are right: an op whose tests are red, or that has none, is not timed.

The tests of an op are the files of `tests/ops` and `tests/kernels` that name it. They run once for
each state of the sources and the machine's device; the report (JUnit XML) is kept in `.benchmarks`
under the hash of all that.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.measure import ROOT

FOLDERS = ("ops", "kernels")
SOURCES = ("mtu_fast", "kernels", "csrc", "tests/ops", "tests/kernels", "tests/helpers")
KINDS = {".py", ".cpp", ".h", ".cu", ".cuh", ".so"}


def files_of(op: str) -> list[Path]:
    """The test files that name the op, relative to the repository."""
    paths = [
        path for folder in FOLDERS for path in sorted((ROOT / "tests" / folder).rglob("test_*.py"))
    ]
    return [path.relative_to(ROOT) for path in paths if re.search(rf"\b{op}\b", path.read_text())]


def run(ops: Iterable[str]) -> Path:
    """Run the tests of these ops, unless this state of the sources was tested before; returns the report."""
    files = sorted({str(path) for op in ops for path in files_of(op)})
    report = ROOT / ".benchmarks" / f"tests-{_state(files)}.xml"
    if not report.exists():
        report.parent.mkdir(exist_ok=True)
        partial = report.with_suffix(f".{os.getpid()}")
        print(f"testing first: {' '.join(files)}", flush=True)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={partial}",
            *files,
        ]
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        if not partial.exists():
            raise RuntimeError(f"pytest left no report; run it yourself: {' '.join(command)}")
        partial.rename(report)
    return report


def why_untrusted(op: str, reports: Sequence[Path]) -> str:
    """Why the op is not to be timed: its tests failed, or none passed; "" where all is well."""
    outcomes = _outcomes(reports)
    modules = {path.with_suffix("").as_posix().replace("/", ".") for path in files_of(op)}
    found = [
        (name, what)
        for name, what in outcomes
        if any(re.match(rf"{re.escape(m)}(\W|$)", name) for m in modules)
    ]
    red = [name for name, what in found if what in {"failure", "error"}]
    if red:
        return f"its tests are red: {len(red)} of {len(found)}, the first {red[0]}"
    return "" if any(what == "passed" for _, what in found) else "no test of it has passed"


def _outcomes(reports: Sequence[Path]) -> list[tuple[str, str]]:
    """(test, "passed", "failure", "error" or "skipped") of every test in the reports; one never written holds none."""
    there = [report for report in reports if report.is_file()]
    cases = [case for report in there for case in ElementTree.parse(report).iter("testcase")]
    return [
        (_name(case), next((part.tag for part in case if part.tag in _BAD), "passed"))
        for case in cases
    ]


_BAD = ("failure", "error", "skipped")


def _name(case: ElementTree.Element) -> str:
    """`module[.class].test`; a file not collected, or skipped as a whole, is its module alone."""
    return ".".join(filter(None, [case.get("classname"), case.get("name")]))


def _state(files: Sequence[str]) -> str:
    """A hash of the sources, of what is tested, and of what it runs on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    state = hashlib.sha256(repr((files, torch.__version__, sys.version, device)).encode())
    paths = [
        path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in KINDS
    ]
    for path in sorted([*paths, ROOT / "tests" / "conftest.py", ROOT / "pyproject.toml"]):
        state.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]
