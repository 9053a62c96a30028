"""The scores of single tasks, on literal values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from mtu_fast.unlearning.metrics import mean_iou, top1


def test_top1() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    assert top1(logits, torch.tensor([0, 1, 2, 1])) == 0.5


@pytest.mark.parametrize(
    ("logits", "target"), [((3, 2), (2,)), ((3,), (3,)), ((0, 2), (0,)), ((3, 2), (3, 1))]
)
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
    [
        ([0, 1], [0], "one shape"),
        ([0, 3], [0, 1], "found 0..3"),
        ([0, 0], [-1, -1], "no pixel counts"),
    ],
)
def test_mean_iou_rejects(predicted: list[int], target: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_iou(torch.tensor(predicted), torch.tensor(target), classes=3)
