"""The table of unlearning: requests, records that are not made again, what a result says and what it lacks."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, demo, protocol, unlearning, unlearning_jobs, unlearning_tables
from benchmarks.cases import Case, Choice
from benchmarks.data import Dataset
from benchmarks.methods import OURS
from benchmarks.protocol import Protocol
from benchmarks.requests import Request, arrange, level, parse
from benchmarks.scenes import make_scenes
from benchmarks.training import divide
from benchmarks.unlearning_records import Attempt, best, open_store
from benchmarks.unlearning_report import comparisons
from benchmarks.unlearning_stats import (
    Paired,
    gaps,
    goals,
    moved_uis,
    paired,
    ranked,
    stop_gap,
    stop_uis,
)
from mtu_fast.unlearning import metrics

SIZES = {"train": 60, "validation": 30, "test": 90}


def split(seed: int) -> dict[str, Dataset]:
    made = make_scenes(SIZES, seed)
    return {**divide(made.pop("train"), 10), **made}


TINY = Case(
    demo.problem(8),
    Protocol(epochs=12, batch=20, retain_batch=6, forget_batch=4, steps=4, every=1, watch=False, grids={
        family: tuple((alpha, 0.1 * lr) for alpha, lr in grid[:2]) for family, grid in cases.DIGITS.items()
    }),
    split, rounds=1,
)  # fmt: skip
PROBLEM = TINY.problem


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cases, "load", lambda choice: TINY)
    cases.parts.cache_clear()
    yield
    cases.parts.cache_clear()


def sources(data: Dataset) -> set[int]:
    return set(data[:].source.flatten().tolist())


# ---- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_", [Request(), Request("class", keep="64"), Request("partial", 30, "tenth", 3)]
)
def test_a_request_is_known_by_its_name(request_: Request) -> None:
    assert parse(request_.name) == request_


@pytest.mark.parametrize(
    "name", ["", "half", "full+60%", "full+0%", "class+10%", "class+x2", "full+keep-7", "full+x0"]
)
def test_requests_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected full, partial or class"):
        parse(name)


def test_requests_one_after_another_forget_different_samples() -> None:
    rounds = arrange(split(1), Request("full", 20, "tenth", 3), PROBLEM, 1)
    gone: set[int] = set()
    for turn, parts in enumerate(rounds):
        assert len(parts["forget"]) == 12
        assert not sources(parts["forget"]) & gone
        gone |= sources(parts["forget"])
        assert sources(parts["gone"]) == gone
        assert not sources(parts["retain"]) & gone
        assert len(parts["retain"]) == 60 - 12 * (turn + 1)
        assert len(parts["available"]) == round(0.1 * len(parts["retain"]))
        assert sources(parts["available"]) <= sources(parts["retain"])


@pytest.mark.parametrize("seed", [1, 5])
def test_a_class_is_forgotten_whole_and_judged_without_it(seed: int) -> None:
    whole = split(seed)
    (parts,) = arrange(whole, Request("class"), PROBLEM, seed)
    left = {name: part[:].labels["left"] for name, part in parts.items()}
    assert (left["forget"] == seed).all() and (left["held_out"] == seed).all()
    for name in ("retain", "validation", "test"):
        assert (left[name] != seed).all()
    assert len(parts["test"]) + len(parts["held_out"]) == SIZES["test"]
    assert len(parts["forget"]) == int((whole["train"][:].labels["left"] == seed).sum()) > 0
    assert sources(parts["forget"]) | sources(parts["retain"]) == sources(whole["train"])
    assert torch.equal(parts["train"][: len(parts["forget"])].source, parts["forget"][:].source)
    assert level(PROBLEM, Request("class"), {"left": 0.9}) == {"left": 0.1}


def test_a_class_of_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="are not one class a sample"):
        arrange(split(1), Request("class"), replace(PROBLEM, partial=("mask",)), 1)


def test_levels_of_a_class_are_those_of_a_guess() -> None:
    attempt = Attempt(Request("class"), "OrthoGrad", True, 1)
    parts = arrange(split(1), attempt.request, PROBLEM, 1)[0]
    torch.manual_seed(0)
    found = unlearning_jobs.levels(TINY, PROBLEM.net(), parts, attempt)
    assert found.score["left"] == 0.1
    assert found.tau["left"] == pytest.approx(math.log(10))
    assert found.tau["right"] != pytest.approx(math.log(10))


# ---- records -------------------------------------------------------------------------------------


def run(tmp_path: Path, *more: str) -> dict[str, Any]:
    options = ["--data", "digits", "--seeds", "2", "--workers", "1", "--out", str(tmp_path)]
    unlearning.main([*options, "--records", str(tmp_path / "records"), *more])
    found: dict[str, Any] = json.loads((tmp_path / "unlearning_digits.json").read_text())
    return found


@pytest.mark.usefixtures("tiny")
def test_the_benchmark_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path, "--methods", f"OrthoGrad,{OURS}")
    printed = capsys.readouterr().out
    assert (tmp_path / "unlearning_digits.txt").read_text() in printed + "\n"
    for name in ("unlearning_digits.png", "unlearning_digits_curves.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = [(r["request"], r["method"], r["levels"], r["seed"]) for r in result["rows"]]
    names = [("original", False), ("retrained", False), (OURS, False), (OURS, True)]
    names += [("OrthoGrad", False), ("OrthoGrad", True)]
    assert lines == [(q, *name, s) for q in ("full", "partial") for name in names for s in (1, 2)]
    with (tmp_path / "unlearning_digits.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["uis"]) for line in table] == [row["uis"] for row in result["rows"]]
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
        and "not run: Fine-tune, Ascent, GradDiff" in printed
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


def test_other_settings_have_other_records(tmp_path: Path) -> None:
    choice = Choice("digits")
    attempt = Attempt(Request(), "∇τ", True, 1, 0.5, 0.1)
    keys = {open_store(tmp_path, TINY, choice).key(attempt)}
    keys.add(open_store(tmp_path, TINY, choice).key(replace(attempt, levels=False)))
    keys.add(open_store(tmp_path, TINY, choice).key(replace(attempt, lr=0.2)))
    other = replace(TINY, protocol=replace(TINY.protocol, steps=5))
    keys.add(open_store(tmp_path, other, choice).key(attempt))
    assert len(keys) == 4


def test_the_best_try_reached_the_level() -> None:
    tries = [{"reached": False, "uis_validation": 1.0}, {"reached": True, "uis_validation": 3.0},
             {"reached": True, "uis_validation": 2.0}]  # fmt: skip
    assert best(tries) is tries[2]
    assert best([*tries, None]) is None and best([]) is None


# ---- what rows say together ----------------------------------------------------------------------


def rows(method: str, levels: bool, uis: list[float], **more: Any) -> list[dict[str, Any]]:
    base = {"method": method, "levels": levels, "reached": True, "gap": 0.1, "auc": 0.5, "drift": 0.1}  # fmt: skip
    return [base | {"seed": i, "uis": value} | more for i, value in enumerate(uis)]


def test_paired_differences_are_of_the_seeds_in_common() -> None:
    ours, other = rows("a", True, [1.0, 2.0, 4.0]), rows("b", False, [2.0, 4.0, 5.0, 90.0])
    # differences -1, -2, -1: mean -4/3, standard error 1/3, t = 4.3027 of 2 degrees of freedom
    found = paired(ours, other, "uis")
    assert found is not None and found.seeds == 3
    assert (found.mean, found.low, found.high) == pytest.approx((
        -4 / 3,
        -4 / 3 - 4.302653 / 3,
        -4 / 3 + 4.302653 / 3,
    ))
    assert paired(ours[:1], other, "uis") == Paired(-1.0, -math.inf, math.inf, 1)
    assert paired(ours[:1], other[1:], "uis") is None


def test_only_complete_lines_that_reached_the_level_are_ranked() -> None:
    found = {
        ("retrained", False): rows("retrained", False, [0.0, 0.0]),
        ("few", False): rows("few", False, [0.1]),
        ("stopped", False): rows("stopped", False, [0.2, 0.2], reached=False),
        ("b", True): rows("b", True, [2.0, 2.0]),
        ("a", False): rows("a", False, [3.0, 2.0]),
    }
    assert ranked(found) == [("b", True), ("a", False)]
    # three seeds are enough, and then those in common decide: 1, 1, 1 against 2, 2, 2
    found["many", True] = rows("many", True, [1.0, 1.0, 1.0, 90.0, 90.0])
    found["three", True] = rows("three", True, [2.0, 2.0, 2.0])
    assert ranked(found) == [("many", True), ("three", True)]
    assert ranked({}) == []


def test_goals_are_what_was_set_and_said_when_they_are_not_reached() -> None:
    found = {
        (OURS, True): rows(OURS, True, [3.0, 5.0], gap=0.06, auc=0.65),
        ("OrthoGrad", False): rows("OrthoGrad", False, [8.0, 8.0], gap=0.1),
        ("OrthoGrad", True): rows("OrthoGrad", True, [5.0, 5.0]),
        ("retrained", False): rows("retrained", False, [2.0, 2.0], auc=0.5),
    }
    made = goals(found, "full")
    assert [(g.found, g.aim) for g in made] == [
        pytest.approx(pair) for pair in ((0.5, 0.7), (0.8, 0.7), (0.6, 0.5), (0.15, 0.1))
    ]
    assert [g.reached for g in made] == [True, False, False, False]
    assert [g.aim for g in goals(found, "partial")][:2] == [0.5, 0.5]
    # one of 30 and one of 70 points are not the retrained model's 50
    found[OURS, True][0]["auc"], found[OURS, True][1]["auc"] = 0.3, 0.7
    assert goals(found, "full")[-1].found == pytest.approx(0.2)
    text = "\n".join(comparisons("full", found))
    assert text.count("NOT REACHED") == 3 and text.count("  reached") == 1
    assert goals({}, "full") == []


def test_goals_are_judged_on_the_seeds_in_common() -> None:
    found = {
        (OURS, True): rows(OURS, True, [3.0, 5.0, 4.0]),
        ("OrthoGrad", False): rows("OrthoGrad", False, [8.0, 8.0, 8.0, 99.0]),
    }
    assert goals(found, "full")[0].found == pytest.approx(0.5)


def test_the_gap_of_the_stop_is_that_of_a_model_at_the_level() -> None:
    scores = {"forget": {"a": 0.6, "b": 0.9}}
    found = {
        ("retrained", False): rows("retrained", False, [0.0, 0.0], scores=scores),
        ("original", False): rows("original", False, [0.0, 0.0], level={"a": 0.8}),
    }
    found["original", False][1]["level"] = {"a": 0.8, "b": 0.7}
    # a mean over both tasks: 0.2 / 2, and (0.2 + 0.2) / 2
    assert stop_gap(found, found["original", False]) == pytest.approx(0.15)
    assert stop_gap(found, found["original", False][:1]) == pytest.approx(0.1)
    for row in found["original", False]:
        del row["level"]
    assert stop_gap(found, found["original", False]) is None


def test_the_uis_of_the_stop_is_that_of_a_model_at_the_level() -> None:
    scores = {"forget": {"a": 1.0, "b": 1.0}, "test": {"a": 0.8, "b": 0.5}}
    o = rows("original", False, [0.0, 0.0], level={"a": 0.6}, scores=scores)
    o[1] = o[1] | {"level": {"a": 0.8, "b": 0.6}}
    # 100/2 · ½ · 0.25, and 100/2 · ½ · 0.2
    assert stop_uis({("original", False): o}, o) == pytest.approx((6.25 + 5) / 2)
    at_the_level = {"forget": {"a": 0.6, "b": 1.0}, "test": scores["test"]}
    assert metrics.uis(scores, at_the_level, ["a"]) == pytest.approx(6.25)
    assert stop_uis({}, o) is None


def test_the_half_of_uis_that_test_data_make_is_that_of_a_model_that_forgot() -> None:
    scores = {"forget": {"a": 1.0, "b": 1.0}, "test": {"a": 0.8, "b": 0.5}}
    moved = {"forget": {"a": 0.8, "b": 1.0}, "test": {"a": 0.6, "b": 0.6}}
    o = rows("original", False, [0.0, 0.0], scores=scores)
    u = rows("OrthoGrad", True, [0.0, 0.0], scores=moved)
    u[1] = u[1] | {"scores": scores}
    # forgets as far as it should, so that its UIS is this half; the other seed did not move
    uis = metrics.uis(scores, moved, ["a"])
    assert moved_uis({("original", False): o}, u[:1]) == pytest.approx(uis)
    assert moved_uis({("original", False): o}, u) == pytest.approx(uis / 2)
    assert moved_uis({}, u) is None


def test_what_is_missing_is_said_once() -> None:
    missing = [
        {"request": request, "method": method, "levels": levels, "missing": "not run"}
        for request in ("full", "partial") for method, levels in (("a", False), ("a", True), ("b", True))
    ]  # fmt: skip
    missing += [{"request": "full", "method": "c", "levels": False, "missing": "seeds 2, 3"}]
    assert list(gaps(missing)) == [
        "full and partial, not run: a, b + levels",
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
