"""The tables of the docs, and what they lack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import unlearning_tables
from benchmarks.methods import OURS
from benchmarks.unlearning_records import Mode
from benchmarks.unlearning_stats import (
    gaps,
)
from tests.benchmarks.unlearning_table.tiny import rows


def test_what_is_missing_is_said_once() -> None:
    missing = [
        {"request": request, "method": method, "levels": levels, "missing": "not run"}
        for request in ("full", "partial")
        for method, levels in [*(("a", mode) for mode in Mode), ("b", Mode.LEVELS), ("b", 2)]
    ]
    missing += [{"request": "full", "method": "c", "levels": 0, "missing": "seeds 2, 3"}]
    assert list(gaps(missing)) == [
        "full and partial, not run: a; b + levels; b, settled",
        "full, seeds 2, 3: c without levels",
    ]


def test_the_tables_of_the_docs_are_those_of_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlearning_tables, "RESULTS", tmp_path)
    assert unlearning_tables.every().startswith("*No runs")
    assert unlearning_tables.lacking() == "* digits: everything.\n* rooms: everything.\n"
    more = {"drift_99": 1.0, "tow": 0.9, "steps": 10, "ms": 20.0, "seconds": 0.2}
    found = rows(OURS, True, [3.0, 5.0], request="full", **more)
    found += rows("OrthoGrad", False, [8.0, 9.0], request="full", **more)
    found += rows("OrthoGrad", True, [6.0], request="full", **more)
    found += rows("GradDiff", False, [2.0, 2.0], request="full", **(more | {"reached": False}))
    found += rows("OrthoGrad", True, [1.5, 2.5], request="class", **more)
    gap = {"request": "full", "method": "OrthoGrad", "levels": True, "missing": "seeds 1"}
    asked = {"full": ["a"], "class": ["a"]}
    result = {"rows": found, "seeds": [0, 1], "requests": asked, "missing": [gap]}
    (tmp_path / "unlearning_digits.json").write_text(json.dumps(result))
    assert f"| {OURS} | - | 4.0 ± 1.4 |" in unlearning_tables.every()
    assert "| OrthoGrad | 8.5 ± 0.7 | 6.0 ± 0.0 (1) |" in unlearning_tables.every()
    assert "| GradDiff | 2.0 ± 0.0* | - |" in unlearning_tables.every()
    leaders = unlearning_tables.leaders()
    assert leaders.index(f"| {OURS} |") < leaders.index("| OrthoGrad |")
    assert "GradDiff" not in leaders and "OrthoGrad + levels" not in leaders
    # 3 - 8 and 5 - 9: mean -4.5, standard error 0.5, t = 12.706 of one degree of freedom
    assert "-4.5 [-10.9, +1.9] (2 seeds)" in unlearning_tables.differences()
    assert "| 0.47 | 0.70 | yes |" in unlearning_tables.reached()
    assert "| 1.00 | 0.50 | **no** |" in unlearning_tables.reached()
    assert "| OrthoGrad + levels | 2.0 ± 0.7 |" in unlearning_tables.requests()
    assert "full, seeds 1: OrthoGrad + levels" in unlearning_tables.lacking()
    assert f"| {OURS} | 4.0 ± 1.4 |" in unlearning_tables.short()
    assert "| original |" not in unlearning_tables.short()  # what was not run has no row


def test_the_tables_hold_runs_that_settled_and_say_which_of_ours_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlearning_tables, "RESULTS", tmp_path)
    found = []
    for method, uis in ((OURS, [1.0, 2.0]), ("GradDiff", [2.0, 4.0]), ("Ascent", [5.0, 5.0])):
        found += rows(method, True, uis, request="full")
        found += rows(method, Mode.SETTLED, uis, request="full")
    found += rows("PCGrad", False, [7.0, 7.0], request="full")
    result = {"rows": found, "seeds": [0, 1], "requests": {"full": ["a"]}, "missing": []}
    (tmp_path / "unlearning_digits.json").write_text(json.dumps(result))
    assert "| GradDiff | - | 3.0 ± 1.4 | 3.0 ± 1.4 |" in unlearning_tables.every()
    line = f"| digits, full | {OURS}, settled |"
    assert f"{line} GradDiff, settled | -1.5 [" in unlearning_tables.differences()
    assert f"{line} UIS over that of PCGrad, the strongest" in unlearning_tables.reached()
    # of each mode the strongest other: neither weaker ones nor one mode for all
    short = unlearning_tables.short()
    names = [line.split(" | ")[0].strip("| ") for line in short.splitlines()[2:]]
    assert names == ["PCGrad", "GradDiff + levels", "GradDiff, settled", f"{OURS}, settled"]
