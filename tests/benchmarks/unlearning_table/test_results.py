"""What rows of results say together: pairs, ranks, goals, the share of the stop."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cases, unlearning_tables
from benchmarks.cases import Choice
from benchmarks.methods import METHODS, OURS
from benchmarks.requests import Request, parse
from benchmarks.unlearning_records import Attempt, Mode, best, open_store, tries
from benchmarks.unlearning_report import comparisons
from benchmarks.unlearning_stats import (
    Paired,
    goals,
    moved_uis,
    ours,
    paired,
    ranked,
    stop_gap,
    stop_uis,
)
from mtu_fast.unlearning import metrics
from tests.benchmarks.unlearning_table.tiny import TINY, rows


def test_other_settings_have_other_records(tmp_path: Path) -> None:
    choice = Choice("digits")
    attempt = Attempt(Request(), "∇τ", Mode.LEVELS, 1, 0.5, 0.1)
    keys = {open_store(tmp_path, TINY, choice).key(attempt)}
    keys.add(open_store(tmp_path, TINY, choice).key(replace(attempt, mode=Mode.PLAIN)))
    keys.add(open_store(tmp_path, TINY, choice).key(replace(attempt, lr=0.2)))
    other = replace(TINY, protocol=replace(TINY.protocol, steps=5))
    keys.add(open_store(tmp_path, other, choice).key(attempt))
    assert len(keys) == 4


def test_the_best_try_reached_the_level() -> None:
    tries = [{"reached": False, "uis_validation": 1.0}, {"reached": True, "uis_validation": 3.0},
             {"reached": True, "uis_validation": 2.0}]  # fmt: skip
    assert best(tries) is tries[2]
    assert best([*tries, None]) is None and best([]) is None


@pytest.mark.parametrize("data", unlearning_tables.DATA)
def test_committed_runs_are_found_by_what_is_asked_for(data: str, tmp_path: Path) -> None:
    """Under another key a run of hours would be made anew."""
    path, choice = unlearning_tables.RESULTS / f"unlearning_{data}.json", Choice(data)
    store = open_store(tmp_path, cases.load(choice), choice, path)
    result = json.loads(path.read_text())
    for record in (*result["rows"], *result["tried"]):
        request, mode = parse(record["request"]), Mode(record["levels"])
        attempt = Attempt(
            request, record["method"], mode, record["seed"], record["alpha"], record["lr"]
        )
        assert store.get(attempt) == record
        assert attempt.settings.items() <= record.items()


def test_every_mode_has_as_many_settings_and_those_that_settle_larger_rates() -> None:
    for quick, count in ((False, 6), (True, 1)):
        case = cases.load(Choice("digits", quick=quick))
        for entry in METHODS.values():
            found = {}
            for mode in Mode:
                asked = tries(case, Request(), entry.name, mode, 0, entry.family)
                found[mode] = [(attempt.alpha, attempt.lr) for attempt in asked]
                assert len(found[mode]) == count
            assert found[Mode.PLAIN] == found[Mode.LEVELS]
            if not quick:
                first = found[Mode.PLAIN][:3]
                assert found[Mode.PLAIN][3:] == [(alpha, lr / 4) for alpha, lr in first]
                assert found[Mode.SETTLED] == [*first, *((alpha, lr * 3) for alpha, lr in first)]


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
        ("retrained", Mode.PLAIN): rows("retrained", False, [0.0, 0.0]),
        ("few", Mode.PLAIN): rows("few", False, [0.1]),
        ("stopped", Mode.PLAIN): rows("stopped", False, [0.2, 0.2], reached=False),
        ("b", Mode.LEVELS): rows("b", True, [2.0, 2.0]),
        ("a", Mode.PLAIN): rows("a", False, [3.0, 2.0]),
    }
    assert ranked(found) == [("b", Mode.LEVELS), ("a", Mode.PLAIN)]
    # three seeds are enough, and then those in common decide: 1, 1, 1 against 2, 2, 2
    found["many", True] = rows("many", True, [1.0, 1.0, 1.0, 90.0, 90.0])
    found["three", True] = rows("three", True, [2.0, 2.0, 2.0])
    assert ranked(found) == [("many", Mode.LEVELS), ("three", Mode.LEVELS)]
    assert ranked({}) == []


def test_goals_are_what_was_set_and_said_when_they_are_not_reached() -> None:
    found = {
        (OURS, Mode.LEVELS): rows(OURS, True, [3.0, 5.0], gap=0.06, auc=0.65),
        ("OrthoGrad", Mode.PLAIN): rows("OrthoGrad", False, [8.0, 8.0], gap=0.1),
        ("OrthoGrad", Mode.LEVELS): rows("OrthoGrad", True, [5.0, 5.0]),
        ("retrained", Mode.PLAIN): rows("retrained", False, [2.0, 2.0], auc=0.5),
    }
    made = goals(found, "full")
    assert [(g.found, g.aim) for g in made] == [
        pytest.approx(pair) for pair in ((0.5, 0.7), (0.8, 0.7), (0.6, 0.5), (0.15, 0.1))
    ]
    assert [g.reached for g in made] == [True, False, False, False]
    assert [g.aim for g in goals(found, "partial")][:2] == [0.5, 0.5]
    # one of 30 and one of 70 points are not the retrained model's 50
    found[OURS, Mode.LEVELS][0]["auc"], found[OURS, Mode.LEVELS][1]["auc"] = 0.3, 0.7
    assert goals(found, "full")[-1].found == pytest.approx(0.2)
    text = "\n".join(comparisons("full", found))
    assert text.count("NOT REACHED") == 3 and text.count("  reached") == 1
    assert goals({}, "full") == []


def test_goals_are_of_our_method_with_all_it_has_against_others_in_each_mode() -> None:
    found = {
        (OURS, Mode.LEVELS): rows(OURS, True, [3.0, 5.0]),
        (OURS, Mode.SETTLED): rows(OURS, True, [1.0, 2.0]),
        ("OrthoGrad", Mode.PLAIN): rows("OrthoGrad", False, [6.0, 6.0]),
        ("OrthoGrad", Mode.LEVELS): rows("OrthoGrad", True, [3.0, 3.0]),
        ("OrthoGrad", Mode.SETTLED): rows("OrthoGrad", True, [2.0, 2.0]),
    }
    assert ours(found) == (OURS, Mode.SETTLED)
    made = goals(found, "full")
    assert [goal.found for goal in made[:3]] == pytest.approx([0.25, 0.5, 0.75])
    for goal, other in zip(
        made, ("OrthoGrad", "OrthoGrad + levels", "OrthoGrad, settled"), strict=False
    ):
        assert f"that of {other}, the strongest" in goal.what
    assert list(comparisons("full", found))[1].startswith(f"full: {OURS}, settled minus")


def test_goals_are_judged_on_the_seeds_in_common() -> None:
    found = {
        (OURS, Mode.LEVELS): rows(OURS, True, [3.0, 5.0, 4.0]),
        ("OrthoGrad", Mode.PLAIN): rows("OrthoGrad", False, [8.0, 8.0, 8.0, 99.0]),
    }
    assert goals(found, "full")[0].found == pytest.approx(0.5)


def test_a_method_that_did_not_come_down_is_held_against_all_others() -> None:
    """Not against one alone that came down by losing everything."""
    found = {
        (OURS, Mode.LEVELS): rows(OURS, True, [3.0, 3.0], reached=False),
        ("OrthoGrad", Mode.LEVELS): rows("OrthoGrad", True, [4.0, 4.0], reached=False),
        ("Ascent", Mode.LEVELS): rows("Ascent", True, [20.0, 20.0]),
    }
    (goal,) = goals(found, "partial")
    assert "OrthoGrad + levels" in goal.what and goal.found == pytest.approx(0.75)
    found[OURS, Mode.LEVELS] = rows(OURS, True, [3.0, 3.0])
    (goal,) = goals(found, "partial")
    assert "Ascent + levels" in goal.what and goal.found == pytest.approx(0.15)


def test_the_gap_of_the_stop_is_that_of_a_model_at_the_level() -> None:
    scores = {"forget": {"a": 0.6, "b": 0.9}}
    found = {
        ("retrained", Mode.PLAIN): rows("retrained", False, [0.0, 0.0], scores=scores),
        ("original", Mode.PLAIN): rows("original", False, [0.0, 0.0], level={"a": 0.8}),
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
    assert stop_uis({("original", Mode.PLAIN): o}, o) == pytest.approx((6.25 + 5) / 2)
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
    assert moved_uis({("original", Mode.PLAIN): o}, u[:1]) == pytest.approx(uis)
    assert moved_uis({("original", Mode.PLAIN): o}, u) == pytest.approx(uis / 2)
    assert moved_uis({}, u) is None
