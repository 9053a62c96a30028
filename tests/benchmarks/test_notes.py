"""The scripts behind the notes run, and the tables made from results have what they should."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

import mtu_fast as mtu
from benchmarks import tables
from benchmarks.notes import (
    exchange_choice,
    float32_products,
    group_norm,
    grouped_rows,
    host_threads,
    language_step,
    many_rows,
    memory_budget,
    memory_cost,
    patch_rows,
    refinement,
    scale_prediction,
    settling,
    small_nets,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_of_a_group_norm_are_the_same_either_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert group_norm.main(["--quick"]) < 1e-4
    assert capsys.readouterr().out.count(" ms") == 2


def test_a_step_beside_a_factorisation(capsys: pytest.CaptureFixture[str]) -> None:
    host_threads.main(["--quick"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("  32 rows: after numpy's ") and float(line.split()[-1]) > 0


def test_float32_products_are_right_and_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    rows = torch.randn(7, 1100, dtype=torch.float64).float()
    wanted = rows.double() @ rows.double().T
    assert_close(float32_products.by_vendor(rows), wanted, rtol=0, atol=1e-6 * 1100)
    assert min(float32_products.main(["--quick"])) > 0
    assert capsys.readouterr().out.count("rows: float64") == len(float32_products.TILES)


def test_small_nets_print_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    for found in small_nets.main(["--quick", "--repeats", "3"]):
        assert found.step > found.ops > 0 and found.step > found.walk > 0 and found.collected > 0
    assert capsys.readouterr().out.count("plain steps") == 2


def test_what_settling_gains_is_a_line_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    found = settling.main(["--data", "digits", "--methods", "GradDiff", "--orders", "1", "--quick"])
    assert list(found) == ["GradDiff, rate 0.4"] and len(found["GradDiff, rate 0.4"]) == 5
    assert "falling, the rest" in capsys.readouterr().out
    rule = settling.falling_within(60)
    assert [rule(step, 40, 300) for step in (40, 70, 100, 200)] == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("script", [grouped_rows, patch_rows])
def test_rows_of_convolutions_print_a_line_per_case(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--quick"])
    (line,) = capsys.readouterr().out.splitlines()
    assert float(line.split()[-1]) > 0


def test_many_rows_prints_a_line_per_case(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_rows, "CASES", (("transformer", 16), ("vit", 16)))
    assert min(many_rows.main(["--quick", "--repeats", "2"])) > 1
    assert capsys.readouterr().out.count("N = ") == len(many_rows.CASES) + 2
    assert many_rows.halved(4)[:8] == [0, 1, 0, 2, 3, 4, 3, 5]


def test_the_choice_of_an_exchange_is_weighed(capsys: pytest.CaptureFixture[str]) -> None:
    left = exchange_choice.main(["--quick", "--repeats", "2", "--models", "mlp"])
    assert len(left) == len(exchange_choice.RANKS) * len(exchange_choice.RATES)
    assert max(left) <= 1 and capsys.readouterr().out.count("mlp") == len(exchange_choice.RANKS)
    one = exchange_choice.Layer(held=10, rows=30, work=1, owner=4.0, columns=2.5)
    assert exchange_choice.waited([one], 0, 2, 10.0) == 4.0 + 10 / 10  # one rank has all the work
    assert exchange_choice.waited([one], 1, 2, 10.0) == 2.5 + 30 / 2 / 10
    # an estimate that errs puts the layer of most work beside another; by time it has a rank of its own
    three = [one._replace(work=work, owner=owner) for work, owner in ((9, 1.0), (8, 9.0), (7, 2.0))]
    infinite = exchange_choice.RATES["no limit"]
    assert exchange_choice.waited(three, 0, 2, infinite) == 11.0
    assert exchange_choice.of_last(three, [1, 9, 2], 2, infinite) == 9.0


def test_predictions_for_many_ranks_are_those_of_the_docs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scale_prediction.main()
    lines = capsys.readouterr().out.splitlines()
    page = (Path(tables.__file__).parents[1] / "docs" / "scale.md").read_text().splitlines()
    assert len(lines) > 2 * len(scale_prediction.MODELS) and set(lines) <= set(page)


def test_refinement_brings_the_residual_down(capsys: pytest.CaptureFixture[str]) -> None:
    refinement.main(["--quick"])
    line = capsys.readouterr().out
    exact, noisy, refined = (float(part.split(",")[0]) for part in line.split("[")[2:])
    assert refined < 2 * exact < noisy


def test_a_step_of_each_budget_can_be_measured() -> None:
    before = memory_budget.ORDINARY
    steps = [
        memory_budget.prepare(str(budget), "True", str(before))
        for budget in (-1, *memory_budget.BUDGETS)
    ]
    for step in steps[1:]:
        assert isinstance(step(), mtu.Update)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_step_on_a_language_model_prints_a_line_per_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("peft")
    found = language_step.main(["--quick"])
    assert found.keys() == {"full", "lora"}
    for cost in found.values():
        assert cost.ordinary > 1 and cost.checked > cost.first > 0
    assert capsys.readouterr().out.count("of the plain step") == 2


def test_the_cost_of_a_memory_is_that_of_a_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_cost, "BATCHES", 4)
    steps = memory_cost.on_data("digits")
    pairs = steps.paired(1)
    assert len(pairs) == 4
    assert min(min(pair) for pair in pairs) > 0
    sizes = set(steps.of_parameters())
    own, kept = max(sizes)[:2]
    assert len(steps.memory) == kept == 4 * (own - 3)  # a mean row for each of three tasks
    # the weights of a head, which rows of one task reach: few enough to be kept explicitly
    assert (own // 3, kept // 3, 5760, 5760, 0) in sizes


def test_a_table_says_what_its_row_says() -> None:
    (line,) = [row for row in tables.fit().splitlines() if row.startswith("| transformer ")]
    (row,) = [
        row
        for row in tables.read_csv("fit.csv")
        if row["model"] == "transformer" and row["way"] == "mtu_fast"
    ]
    assert line.split("|")[2].split()[0] == row["samples"]


def test_stale_tables_are_found() -> None:
    text = "before\n<!-- table: fit -->\n| wrong |\n<!-- end -->\nafter\n"
    found = tables.filled(text)
    assert found.startswith("before\n")
    assert found.endswith("<!-- end -->\nafter\n")
    assert "wrong" not in found
    assert tables.filled(found) == found
