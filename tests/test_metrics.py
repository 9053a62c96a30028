"""The scores of unlearning, on literal values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mtu_fast.metrics import gaps, mean_gap, mean_iou, over_forgotten, parameter_shift, top1, tow, uis

ORIGINAL = {"forget": {"a": 1.0, "b": 1.0}, "retain": {"a": 1.0, "b": 1.0}, "test": {"a": 0.8, "b": 0.5}}
UNLEARNED = {"forget": {"a": 0.6, "b": 0.9}, "retain": {"a": 0.9, "b": 1.0}, "test": {"a": 0.7, "b": 0.5}}
RETRAINED = {"forget": {"a": 0.7, "b": 0.5}, "retain": {"a": 1.0, "b": 1.0}, "test": {"a": 0.8, "b": 0.5}}


def test_top1() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    assert top1(logits, torch.tensor([0, 1, 2, 1])) == 0.5


@pytest.mark.parametrize(("logits", "target"), [((3, 2), (2,)), ((3,), (3,)), ((0, 2), (0,)), ((3, 2), (3, 1))])
def test_top1_rejects_shapes(logits: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits \[N, C\]"):
        top1(torch.zeros(logits), torch.zeros(target, dtype=torch.long))


def test_mean_iou() -> None:
    predicted = torch.tensor([[0, 0, 1], [1, 1, 2]])
    target = torch.tensor([[0, 1, 1], [1, 2, 2]])
    # class 0: 1 of 2; class 1: 2 of 4; class 2: 1 of 2
    assert mean_iou(predicted, target, classes=3) == pytest.approx(0.5)


def test_mean_iou_leaves_out_ignored_pixels_and_absent_classes() -> None:
    predicted, target = torch.tensor([0, 1, 1, 3]), torch.tensor([0, 0, 1, -1])
    # class 0: 1 of 2; class 1: 1 of 2; classes 2 and 3 do not occur among the pixels that count
    assert mean_iou(predicted, target, classes=4) == pytest.approx(0.5)
    assert mean_iou(target[:3], target[:3], classes=4) == 1.0


def test_mean_iou_is_that_of_the_whole_set_not_of_each_image() -> None:
    predicted, target = torch.tensor([[1, 1], [0, 0]]), torch.tensor([[1, 1], [0, 1]])
    # whole set: class 0 1 of 2, class 1 2 of 3; the mean over images would be (1 + 1/4) / 2
    assert mean_iou(predicted, target, classes=2) == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [([0, 1], [0], "one shape"), ([0, 3], [0, 1], "found 0..3"), ([0, 0], [-1, -1], "no pixel counts")],
)
def test_mean_iou_rejects(predicted: list[int], target: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_iou(torch.tensor(predicted), torch.tensor(target), classes=3)


def test_uis_full_task() -> None:
    # a: (|.8 - .7| + |.8 - .6|) / .8 / 2 = .1875; b: (0 + |.5 - .9|) / .5 / 2 = .4
    assert uis(ORIGINAL, UNLEARNED) == pytest.approx(100 * (0.1875 + 0.4) / 2)


def test_uis_partial_task() -> None:
    # a is a target: .1875; b is not, its forget score must stay: (0 + |1 - .9| / 1) / 2 = .05
    assert uis(ORIGINAL, UNLEARNED, targets=["a"]) == pytest.approx(100 * (0.1875 + 0.05) / 2)


def test_uis_of_a_removed_class() -> None:
    # second terms .6 / .8 and .9 / .5
    assert uis(ORIGINAL, UNLEARNED, removal="class") == pytest.approx(100 * ((0.125 + 0.75) / 2 + 1.8 / 2) / 2)


def test_uis_is_zero_where_forgotten_data_score_like_unseen_data() -> None:
    ideal = {"forget": dict(ORIGINAL["test"]), "test": dict(ORIGINAL["test"])}
    assert uis(ORIGINAL, ideal) == 0.0


def test_uis_of_doing_nothing_is_the_generalisation_gap() -> None:
    # (0 + .2 / .8) / 2 and (0 + .5 / .5) / 2
    assert uis(ORIGINAL, ORIGINAL) == pytest.approx(100 * (0.125 + 0.5) / 2)
    assert uis(ORIGINAL, ORIGINAL, targets=["a"]) == pytest.approx(100 * 0.125 / 2)


def test_uis_rejects() -> None:
    with pytest.raises(ValueError, match="'depth'"):
        uis(ORIGINAL, UNLEARNED, targets=["depth"])
    with pytest.raises(ValueError, match="at least one"):
        uis(ORIGINAL, UNLEARNED, targets=[])
    with pytest.raises(ValueError, match="removal"):
        uis(ORIGINAL, UNLEARNED, removal="batch")
    with pytest.raises(ValueError, match="'test' is missing"):
        uis(ORIGINAL, {"forget": UNLEARNED["forget"]})
    with pytest.raises(ValueError, match="test score of task 'a' is 0"):
        uis({**ORIGINAL, "test": {"a": 0.0, "b": 0.5}}, UNLEARNED)
    with pytest.raises(ValueError, match="not finite for \\['b'\\]"):
        uis(ORIGINAL, {**UNLEARNED, "forget": {"a": 0.5, "b": math.nan}})
    with pytest.raises(ValueError, match="another has"):
        uis(ORIGINAL, {**UNLEARNED, "test": {"a": 0.5}})


def test_gaps_and_their_mean() -> None:
    found = gaps(UNLEARNED, RETRAINED)
    assert found["forget"] == pytest.approx({"a": 0.1, "b": 0.4})
    assert found["retain"] == pytest.approx({"a": 0.1, "b": 0.0})
    assert found["test"] == pytest.approx({"a": 0.1, "b": 0.0})
    assert mean_gap(UNLEARNED, RETRAINED) == pytest.approx(0.7 / 6)
    with pytest.raises(ValueError, match="'test' is missing"):
        gaps(UNLEARNED, {k: RETRAINED[k] for k in ("forget", "retain")})


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
