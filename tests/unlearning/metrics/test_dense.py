"""Losses and scores of dense tasks, on literal values and against loops over pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtu_fast.unlearning.metrics import (
    depth_loss,
    depth_scores,
    normal_loss,
    normal_scores,
    pixel_accuracy,
    present,
    segmentation_loss,
    valid_pixels,
)


def rays(*degrees: float) -> Tensor:
    """Unit vectors in the x-z plane at these angles from z, [1, 3, 1, n]."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.sin(), torch.zeros_like(angle), angle.cos()])[None, :, None]


def test_a_pixel_is_valid_when_its_channels_do_not_sum_to_zero() -> None:
    target = torch.tensor([[0.0, 1.0, 0.6], [0.0, 0.0, 0.0], [0.0, 0.0, -0.6]])[None, :, None]
    assert valid_pixels(target).tolist() == [[[False, True, False]]]


def test_present_names_the_samples_with_something_to_learn_from() -> None:
    depth = torch.zeros(3, 1, 2, 2)
    depth[1, 0, 1, 1] = 2.0
    segmentation = torch.tensor([[[-1, -1]], [[-1, 0]], [[3, -1]]])
    labels = {"seg": segmentation, "depth": depth, "class": torch.tensor([0, -1, 5])}
    found = {task: mask.tolist() for task, mask in present(labels).items()}
    assert found == {
        "seg": [False, True, True],
        "depth": [False, True, False],
        "class": [True, False, True],
    }


def test_segmentation_loss_is_the_mean_over_the_pixels_that_count() -> None:
    logits = torch.zeros(2, 2, 1, 2, dtype=torch.float64)
    logits[0, 1] = math.log(3.0)  # probabilities 1/4, 3/4
    loss = segmentation_loss(logits, torch.tensor([[[0, 1]], [[-1, 0]]]))
    assert loss.tolist() == pytest.approx([(math.log(4) + math.log(4 / 3)) / 2, math.log(2)])


def test_depth_loss_leaves_out_what_was_not_measured() -> None:
    target = torch.tensor([[1.0, 0.0, 4.0], [0.0, 0.0, 2.0]])[:, None, None]
    loss = depth_loss(torch.tensor([[2.0, 9.0, 1.0], [7.0, 7.0, 2.5]])[:, None, None], target)
    assert loss.tolist() == [2.0, 0.5]


def test_normal_loss_is_one_minus_the_cosine() -> None:
    target = rays(0, 0, 0)
    target[..., 2] = 0
    assert normal_loss(rays(60, 180, 45), target).tolist() == pytest.approx([(0.5 + 2.0) / 2])


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, Tensor]] = {
    "segmentation": (segmentation_loss, 4, torch.full((3, 2, 2), -1)),
    "depth": (depth_loss, 1, torch.zeros(3, 1, 2, 2)),
    "normal": (normal_loss, 3, torch.zeros(3, 3, 2, 2)),
}


@pytest.mark.parametrize("task", CASES)
def test_a_sample_without_a_valid_pixel_has_loss_and_gradient_zero(task: str) -> None:
    loss_of, channels, target = CASES[task]
    target = target.clone()
    target[1] = 1
    predicted = torch.randn(3, channels, 2, 2, requires_grad=True)
    loss = loss_of(predicted, target)
    loss.sum().backward()
    assert loss.shape == (3,) and predicted.grad is not None
    assert loss[0] == 0 and loss[2] == 0 and loss[1] != 0
    assert not predicted.grad[[0, 2]].any() and predicted.grad[1].any()
    assert present({task: target})[task].tolist() == [False, True, False]


def test_pixel_accuracy() -> None:
    target = torch.tensor([[0, 1, 2], [2, -1, -1]])
    assert pixel_accuracy(torch.tensor([[0, 1, 1], [2, 0, 1]]), target) == 0.75


def test_depth_scores() -> None:
    target = torch.tensor([1.0, 2.0, 4.0, 0.0, 1.0])[None, None, None]
    found = depth_scores(torch.tensor([1.2, 1.5, 4.0, 3.0, -1.0])[None, None, None], target)
    # ratios 1.2, 1.33, 1; not measured; not positive
    assert found == pytest.approx({
        "abs": (0.2 + 0.5 + 2) / 4,
        "rel": (0.2 + 0.25 + 2) / 4,
        "within_1.25": 0.5,
    })


def test_a_ratio_of_exactly_a_quarter_more_is_not_within() -> None:
    depth, target = (torch.tensor(values)[None, None, None] for values in ([5.0, 4.0], [4.0, 5.0]))
    assert depth_scores(depth, target)["within_1.25"] == 0.0


def test_normal_scores() -> None:
    target = rays(0, 0, 0, 0, 0)
    found = normal_scores(rays(0, 10, 20, 25, 120) * 3.0, target)
    assert found == pytest.approx({
        "mean": 35.0,
        "median": 20.0,
        "within_11.25": 0.4,
        "within_22.5": 0.6,
        "within_30": 0.8,
    })


def test_small_angles_are_exact_and_a_zero_normal_is_ninety_degrees_off() -> None:
    assert normal_scores(rays(1e-6), rays(0))["mean"] == pytest.approx(1e-6, rel=1e-6)
    assert normal_scores(torch.zeros(1, 3, 1, 1), rays(0))["mean"] == 90.0


def test_the_median_of_an_even_number_lies_between_the_middle_two() -> None:
    assert normal_scores(rays(10, 20), rays(0, 0))["median"] == pytest.approx(15.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: valid_pixels(torch.zeros(2, 3, 3)), r"\[N, C, H, W\]; got \(2, 3, 3\)"),
        (
            lambda: segmentation_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 5)),
            r"got .*\(2, 4, 5\)",
        ),
        (lambda: depth_loss(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)), r"\[N, 1, H, W\]"),
        (
            lambda: depth_scores(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5)),
            r"got \(2, 1, 4, 4\)",
        ),
        (lambda: normal_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)), r"\[N, 3, H, W\]"),
        (
            lambda: normal_scores(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)),
            "none of the 4 pixels",
        ),
        (
            lambda: depth_scores(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)),
            "none of the 4 pixels",
        ),
        (lambda: pixel_accuracy(torch.zeros(2, 3), torch.full((2, 3), -1)), "none of the 6 pixels"),
        (lambda: pixel_accuracy(torch.zeros(2, 5, 3), torch.zeros(2, 3)), "argmax"),
    ],
)
def test_shapes_and_empty_targets_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
