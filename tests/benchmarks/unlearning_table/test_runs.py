"""The benchmark from its command line to files: what it prints, records that are not made again, what it lacks."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, protocol, unlearning
from benchmarks.methods import METHODS, OURS
from benchmarks.unlearning_records import Mode
from tests.benchmarks.unlearning_table.tiny import TINY


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cases, "load", lambda choice: TINY)
    cases.parts.cache_clear()
    yield
    cases.parts.cache_clear()


def run(tmp_path: Path, *more: str) -> dict[str, Any]:
    options = ["--data", "digits", "--seeds", "2", "--workers", "1", "--out", str(tmp_path)]
    unlearning.main([*options, "--records", str(tmp_path / "records"), *more])
    found: dict[str, Any] = json.loads((tmp_path / "unlearning_digits.json").read_text())
    return found


@pytest.mark.usefixtures("tiny")
def test_the_benchmark_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path, "--methods", f"OrthoGrad,{OURS}", "--levels", "both")
    printed = capsys.readouterr().out
    assert (tmp_path / "unlearning_digits.txt").read_text() in printed + "\n"
    for name in ("unlearning_digits.png", "unlearning_digits_curves.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = [(r["request"], r["method"], r["levels"], r["seed"]) for r in result["rows"]]
    names = [
        ("original", Mode.PLAIN),
        ("retrained", Mode.PLAIN),
        (OURS, Mode.PLAIN),
        (OURS, Mode.LEVELS),
    ]
    names += [("OrthoGrad", Mode.PLAIN), ("OrthoGrad", Mode.LEVELS)]
    assert lines == [(q, *name, s) for q in ("full", "partial") for name in names for s in (1, 2)]
    with (tmp_path / "unlearning_digits.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["uis"]) for line in table] == [row["uis"] for row in result["rows"]]
    assert {line["levels"] for line in table} == {"plain", "levels"}
    chosen = {(c["request"], c["method"], c["levels"]): (c["alpha"], c["lr"]) for c in result["chosen"]}  # fmt: skip
    for line in chosen:
        tried = [t for t in result["tried"] if (t["request"], t["method"], t["levels"]) == line]
        if line[1] in ("original", "retrained"):
            assert not tried
            continue
        assert len(tried) == 2 and {t["seed"] for t in tried} == {0}
        least = min(tried, key=lambda t: (not t["reached"], t["uis_validation"]))
        assert (least["alpha"], least["lr"]) == chosen[line]
        assert "uis" not in least  # nothing of test data
    for row in result["rows"]:
        if row["method"] not in ("original", "retrained"):
            assert (row["alpha"], row["lr"]) == chosen[row["request"], row["method"], row["levels"]]
            assert row["history"][0]["drift"] == 0 and row["history"][-1]["step"] == row["steps"]
            assert row["seconds"] > 0 or row["steps"] == 0
    asked = ("full", "OrthoGrad", True)
    mine = [r["uis"] for r in result["rows"] if (r["request"], r["method"], r["levels"]) == asked]
    said = next(x for x in printed.splitlines() if x.startswith("OrthoGrad + levels"))
    assert f"{statistics.fmean(mine):.1f} ±{statistics.stdev(mine):.1f}" in said
    assert (
        "THIS TABLE IS NOT COMPLETE" in printed
        and "Levelled OrthoGrad, settled; Fine-tune; Ascent; GradDiff" in printed
    )


@pytest.mark.usefixtures("tiny")
def test_what_is_recorded_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--methods", "GradDiff", "--levels", "without", "--requests", "full"]
    first = run(tmp_path, *options)
    path = next((tmp_path / "records" / "digits").glob("full-GradDiff-plain-seed2*.json"))
    path.unlink()
    made: list[int] = []
    right = protocol.unlearn

    def counted(*arguments: Any, **more: Any) -> Any:
        made.append(1)
        return right(*arguments, **more)

    monkeypatch.setattr(protocol, "unlearn", counted)
    (tmp_path / "unlearning_digits.json").unlink()
    second = run(tmp_path, *options)
    assert len(made) == 1
    timed = ("date", "seconds", "ms")
    for old, new in zip(first["rows"], second["rows"], strict=True):
        assert {k: v for k, v in old.items() if k not in timed} == {
            k: v for k, v in new.items() if k not in timed
        }
    # the table that was written stands for the records it was made of
    for old in (tmp_path / "records" / "digits").glob("*.json"):
        old.unlink()
    assert run(tmp_path, *options)["rows"] == second["rows"] and len(made) == 1


@pytest.mark.usefixtures("tiny")
def test_runs_that_settle_have_records_and_settings_of_their_own(tmp_path: Path) -> None:
    result = run(
        tmp_path, "--methods", "GradDiff", "--levels", "settled", "--requests", "full,class"
    )
    mine = [row for row in result["rows"] if row["method"] == "GradDiff"]
    assert [(r["request"], r["levels"]) for r in mine] == [("full", 2)] * 2 + [("class", 2)] * 2
    # those of a class are those of the partial request
    assert {t["request"] for t in result["tried"]} == {"full", "partial"}
    asked = {(t["alpha"], t["lr"]) for t in result["tried"]}
    assert asked == set(TINY.protocol.grids[cases.settled(METHODS["GradDiff"].family)])
    assert {(row["alpha"], row["lr"]) for row in mine} <= asked
    assert all(row["steps"] == TINY.protocol.steps for row in mine)
    assert len(list((tmp_path / "records/digits").glob("class-GradDiff-settled-seed*.json"))) == 2
    with (tmp_path / "unlearning_digits.csv").open() as file:
        assert {line["levels"] for line in csv.DictReader(file)} == {"plain", "settled"}


@pytest.mark.usefixtures("tiny")
def test_a_table_of_before_runs_could_settle_still_reads(tmp_path: Path) -> None:
    """Its records say with a bool whether a run had levels."""
    options = ["--methods", "GradDiff", "--requests", "full", "--levels", "both"]
    first = run(tmp_path, *options)
    path = tmp_path / "unlearning_digits.json"
    old = json.loads(path.read_text())
    for record in (*old["rows"], *old["tried"]):
        record["levels"] = bool(record["levels"])
    path.write_text(json.dumps(old))
    for record in (tmp_path / "records" / "digits").glob("*.json"):
        record.unlink()
    again = run(tmp_path, *options, "--join")
    for name in ("rows", "tried", "chosen", "missing"):
        assert again[name] == first[name]
    assert {type(record["levels"]) for record in (*again["rows"], *again["tried"])} == {int}


def test_every_mode_is_run() -> None:
    def modes(*arguments: str) -> tuple[Mode, ...]:
        options = unlearning.parser_of().parse_args(list(arguments))
        return unlearning.plan_of(options).modes

    assert modes("--all") == modes() == tuple(Mode)
    assert modes("--levels", "both") == (Mode.PLAIN, Mode.LEVELS)
    assert modes("--levels", "settled") == (Mode.SETTLED,)


@pytest.mark.usefixtures("tiny")
def test_a_table_of_some_records_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--methods", "GradDiff,Ascent", "--requests", "full", "--levels", "without")
    records = tmp_path / "records" / "digits"
    next(records.glob("full-GradDiff-plain-seed1*.json")).unlink()
    next(records.glob("full-Ascent-plain-seed0*.json")).unlink()
    (tmp_path / "unlearning_digits.json").unlink()
    capsys.readouterr()
    result = run(tmp_path, "--join")
    printed = capsys.readouterr().out
    assert {row["method"] for row in result["rows"]} == {"original", "retrained", "GradDiff"}
    assert "full, seeds 1: GradDiff without levels" in printed
    assert "full, not all settings tried on the seed of the search: Ascent without" in printed
    assert "GradDiff (1)" in printed


@pytest.mark.usefixtures("tiny")
def test_other_requests_take_the_settings_of_full_and_partial(tmp_path: Path) -> None:
    asked = "full+x2,class,partial+30%+keep-tenth"
    result = run(tmp_path, "--methods", "OrthoGrad", "--levels", "with", "--requests", asked)
    assert {row["request"] for row in result["rows"]} == set(asked.split(","))
    assert {t["request"] for t in result["tried"]} == {"full", "partial"}
    chosen = {c["request"]: (c["alpha"], c["lr"]) for c in result["chosen"] if c["alpha"]}
    assert chosen["class"] == chosen["partial+30%+keep-tenth"]
    twice = next(r for r in result["rows"] if r["request"] == "full+x2" and r["method"] == "OrthoGrad")  # fmt: skip
    assert {seen["round"] for seen in twice["history"]} == {0, 1}
    nets = {path.name.split("-seed")[0] for path in (tmp_path / "records/digits/nets").iterdir()}
    assert nets == {"original", "full+x2", "class", "partial+30%"}
