"""The scores of unlearning from score tables, on literal values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mtu_fast.unlearning.metrics import gaps, mean_gap, over_forgotten, parameter_shift, tow, uis

ORIGINAL = {
    "forget": {"a": 1.0, "b": 1.0},
    "retain": {"a": 1.0, "b": 1.0},
    "test": {"a": 0.8, "b": 0.5},
}
UNLEARNED = {
    "forget": {"a": 0.6, "b": 0.9},
    "retain": {"a": 0.9, "b": 1.0},
    "test": {"a": 0.7, "b": 0.5},
}
RETRAINED = {
    "forget": {"a": 0.7, "b": 0.5},
    "retain": {"a": 1.0, "b": 1.0},
    "test": {"a": 0.8, "b": 0.5},
}


def test_uis_full_task() -> None:
    # a: (|.8 - .7| + |.8 - .6|) / .8 / 2 = .1875; b: (0 + |.5 - .9|) / .5 / 2 = .4
    assert uis(ORIGINAL, UNLEARNED) == pytest.approx(100 * (0.1875 + 0.4) / 2)


def test_uis_partial_task() -> None:
    # a is a target: .1875; b is not, its forget score must stay: (0 + |1 - .9| / 1) / 2 = .05
    assert uis(ORIGINAL, UNLEARNED, targets=["a"]) == pytest.approx(100 * (0.1875 + 0.05) / 2)


def test_uis_of_a_removed_class() -> None:
    # second terms .6 / .8 and .9 / .5
    assert uis(ORIGINAL, UNLEARNED, removal="class") == pytest.approx(
        100 * ((0.125 + 0.75) / 2 + 1.8 / 2) / 2
    )


def test_uis_is_zero_where_forgotten_data_score_like_unseen_data() -> None:
    ideal = {"forget": dict(ORIGINAL["test"]), "test": dict(ORIGINAL["test"])}
    assert uis(ORIGINAL, ideal) == 0.0


def test_uis_of_doing_nothing_is_the_generalisation_gap() -> None:
    # (0 + .2 / .8) / 2 and (0 + .5 / .5) / 2
    assert uis(ORIGINAL, ORIGINAL) == pytest.approx(100 * (0.125 + 0.5) / 2)
    assert uis(ORIGINAL, ORIGINAL, targets=["a"]) == pytest.approx(100 * 0.125 / 2)


def test_uis_rejects() -> None:
    with pytest.raises(ValueError, match="removal"):
        uis(ORIGINAL, UNLEARNED, removal="batch")
    with pytest.raises(ValueError, match="'test' is missing"):
        uis(ORIGINAL, {"forget": UNLEARNED["forget"]})
    with pytest.raises(ValueError, match="not finite for \\['b'\\]"):
        uis(ORIGINAL, {**UNLEARNED, "forget": {"a": 0.5, "b": math.nan}})
    with pytest.raises(ValueError, match="another has"):
        uis(ORIGINAL, {**UNLEARNED, "test": {"a": 0.5}})


@pytest.mark.parametrize("bad", [0.0, -0.5])
def test_uis_needs_positive_scores_where_it_divides(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"test score of task 'a' is {bad:g}.*must be positive"):
        uis({**ORIGINAL, "test": {"a": bad, "b": 0.5}}, UNLEARNED)
    low = {**ORIGINAL, "forget": {"a": 1.0, "b": bad}}
    with pytest.raises(ValueError, match=rf"forget score of task 'b' is {bad:g}.*must be positive"):
        uis(low, UNLEARNED, targets=["a"])
    assert uis(low, UNLEARNED, targets=["b"]) > 0  # a target's forget score divides nothing


@pytest.mark.parametrize("of", [uis, over_forgotten])
def test_targets_are_several_known_names(of: Any) -> None:
    with pytest.raises(ValueError, match=r"targets: found unknown tasks \['depth'\].*\['a', 'b'\]"):
        of(ORIGINAL, UNLEARNED, targets=["a", "depth"])
    with pytest.raises(ValueError, match="targets: found no name, expected at least one"):
        of(ORIGINAL, UNLEARNED, targets=[])
    with pytest.raises(TypeError, match=r"targets: found 'ab', expected several names"):
        of(ORIGINAL, UNLEARNED, targets="ab")
    assert of(ORIGINAL, UNLEARNED, targets=iter("ba")) == of(ORIGINAL, UNLEARNED)


@pytest.mark.parametrize("of", [gaps, mean_gap, tow])
def test_empty_tables_compare_to_nothing(of: Any) -> None:
    with pytest.raises(ValueError, match="the score tables are empty"):
        of({}, {})


def test_gaps_and_their_mean() -> None:
    found = gaps(UNLEARNED, RETRAINED)
    assert found["forget"] == pytest.approx({"a": 0.1, "b": 0.4})
    assert found["retain"] == pytest.approx({"a": 0.1, "b": 0.0})
    assert found["test"] == pytest.approx({"a": 0.1, "b": 0.0})
    assert mean_gap(UNLEARNED, RETRAINED) == pytest.approx(0.7 / 6)
    with pytest.raises(ValueError, match="'test' is missing"):
        gaps(UNLEARNED, {k: RETRAINED[k] for k in ("forget", "retain")})
    with pytest.raises(ValueError, match="'test' is missing"):
        gaps({k: UNLEARNED[k] for k in ("forget", "retain")}, RETRAINED)


def test_tow() -> None:
    assert tow(UNLEARNED, RETRAINED) == pytest.approx({"a": 0.9**3, "b": 0.6})
    assert tow(RETRAINED, RETRAINED) == {"a": 1.0, "b": 1.0}
    with pytest.raises(ValueError, match="fractions"):
        tow({**UNLEARNED, "test": {"a": 70.0, "b": 50.0}}, RETRAINED)


def test_over_forgotten_names_the_targets_below_the_retrained_model() -> None:
    assert over_forgotten(UNLEARNED, RETRAINED) == ("a",)
    assert over_forgotten(UNLEARNED, RETRAINED, targets=["b"]) == ()
    assert over_forgotten(RETRAINED, RETRAINED) == ()


def test_parameter_shift() -> None:
    before = [torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])]
    after = [torch.tensor([[3.0, 2.0]]), torch.tensor([4.0])]
    assert parameter_shift(before, after) == pytest.approx(0.4)
    assert parameter_shift(before, before) == 0.0


def test_parameter_shift_takes_modules_parameters_and_sums_in_float64() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    moved = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2e20)  # its square overflows float32
        moved.weight.fill_(3e20)
    assert parameter_shift(model.parameters(), moved.parameters()) == pytest.approx(0.5)


def test_parameter_shift_rejects() -> None:
    with pytest.raises(ValueError, match="match one to one"):
        parameter_shift([torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="all 0"):
        parameter_shift([torch.zeros(2)], [torch.ones(2)])
