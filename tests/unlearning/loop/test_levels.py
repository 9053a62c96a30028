"""Levels: which samples and tasks are forgotten already, and what a task that stalls gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from tests.unlearning.loop.levels import HELD_OUT, LOSSES, MASK, F, Given, K, N, R, kinds, known

pytestmark = pytest.mark.usefixtures("one_thread")


def test_measures_means_and_scores_of_data_never_seen() -> None:
    levels = known()
    assert levels.tau == {"a": 3.0, "b": 3.0}
    assert levels.score == {"a": 0.5, "b": 0.5}
    assert levels.kappa == {"a": 1.0, "b": 1.0} and levels.resting == ()
    assert "tau={'a': 3.0" in repr(levels)


def test_samples_past_the_mean_rest() -> None:
    found = known().left(LOSSES, MASK)
    assert kinds(found) == {"a": [F, F, R, R, K, K], "b": [R, F, F, R, K, K]}


def test_of_a_partial_request_only_targets_rest() -> None:
    found = known().left(LOSSES, {"b": MASK})
    assert kinds(found) == {"a": [K] * N, "b": [R, F, F, R, K, K]}


@pytest.mark.parametrize("shape", ["one tensor", "float32", "with a graph"])
def test_losses_of_other_shapes(shape: str) -> None:
    levels = mtu.Levels().measure(nn.Linear(1, 1), [HELD_OUT], lambda model, batch: batch)
    loss = LOSSES["a"].clone()
    if shape == "float32":
        loss = loss.float()
    if shape == "with a graph":
        loss = loss.requires_grad_() * 1.0
    assert kinds(levels.left(loss, MASK)) == {"loss": [F, F, R, R, K, K]}
    assert levels.score == {"loss": -3.0}  # minus the mean loss


def test_tasks_at_their_score_rest_until_they_leave_it() -> None:
    levels = known()
    levels.update({"a": 0.5, "b": 0.9})
    assert levels.resting == ("a",)
    assert kinds(levels.left(LOSSES, MASK)) == {"a": [R] * 4 + [K] * 2, "b": [R, F, F, R, K, K]}
    levels.update({"a": 0.6, "b": 0.2, "another": 0.0})
    assert levels.resting == ("b",)
    assert kinds(levels.left(LOSSES, MASK))["a"] == [F, F, R, R, K, K]


def test_a_level_for_each_rank() -> None:
    """Losses 0.1, 2.9, 3, 9 of ranks 0 to 3 against the quantiles 1, 2, 3, 6; another order, the same samples."""
    levels = known(quantiles=True)
    assert kinds(levels.left({"a": LOSSES["a"]}, MASK)) == {"a": [F, R, R, R, K, K]}
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    turned = levels.left({"a": LOSSES["a"][order]}, MASK[order])
    assert turned["a"].tolist() == [[F, R, R, R, K, K][i] for i in order]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_quantiles_are_those_of_torch(count: int) -> None:
    """A loss rests exactly where it reaches the (j + 1/2) / n quantile, j its rank."""
    draw = torch.Generator().manual_seed(count)
    unseen = torch.rand(100, generator=draw, dtype=torch.float64)
    levels = mtu.Levels(quantiles=True).measure(nn.Linear(1, 1), [unseen], lambda model, x: x)
    loss = torch.rand(count, generator=draw, dtype=torch.float64)
    found = levels.left(loss, True)["loss"]
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    at = torch.quantile(unseen, share, interpolation="linear")
    # torch's q of the lowest is 0, of the highest 1; ours are at half a rank
    place = (share * 100 - 0.5).clamp(0, 99) / 99
    at = torch.quantile(unseen, place)
    assert ((found[loss.argsort()] == F) == (loss.sort().values < at)).all()


def test_samples_without_a_label_neither_rest_nor_count() -> None:
    levels = known(quantiles=True)
    there = {"a": torch.tensor([False, True, True, True, True, True])}
    found = levels.left({"a": LOSSES["a"]}, MASK, there)["a"]
    assert found[1:].tolist() == [R, R, R, K, K]
    assert int(levels.held.seen["a"]) == 3


# ---- runs that stall -----------------------------------------------------------------------------


def test_a_task_that_stalls_gets_a_higher_level() -> None:
    levels, past = known(growth=1.5), {"a": torch.full((N,), 4.0), "b": torch.full((N,), 1.0)}
    for _step in range(3):
        assert (levels.left(past, MASK)["a"][:4] == R).all()
    levels.update({"a": 0.9, "b": 0.9})
    assert levels.kappa == {"a": 1.5, "b": 1.0}  # 4.5 for a, whose score is above its level
    assert (levels.left(past, MASK)["a"][:4] == F).all()
    levels.update({"a": 0.9, "b": 0.9})
    assert levels.kappa == {"a": 1.5, "b": 1.0}  # it moved


def test_a_task_at_its_level_and_one_without_steps_do_not_stall() -> None:
    levels, past = known(), {"a": torch.full((N,), 4.0), "b": torch.full((N,), 4.0)}
    levels.update({"a": 0.9, "b": 0.9})
    levels.left(past, MASK)
    levels.update({"a": 0.4, "b": 0.9})
    assert levels.kappa == {"a": 1.0, "b": 1.25}


@pytest.mark.parametrize("left", [1, 2, 3])
def test_one_row_in_twenty_is_no_movement(left: int) -> None:
    """Of 40 rows since the last evaluation."""
    levels = known()
    for i in range(10):
        loss = torch.full((N,), 4.0)
        if i < left:
            loss[0] = 1.0
        levels.left({"a": loss}, MASK)
    levels.update({"a": 0.9})
    assert levels.kappa["a"] == (1.25 if left <= 2 else 1.0)


def test_a_negative_level_rises_too() -> None:
    levels = mtu.Levels(growth=2.0).measure(
        nn.Linear(1, 1),
        [torch.full((4,), -3.0)],
        lambda model, x: x,
        lambda model, x: {"loss": 0.0},
    )
    levels.left(torch.full((N,), -2.0), True)
    levels.update({"loss": 1.0})
    assert (levels.left(torch.full((N,), -1.0), True)["loss"] == F).all()  # the level is 0 now
    assert (levels.left(torch.full((N,), 0.0), True)["loss"] == R).all()


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"quantiles": 3}, TypeError, "quantiles: found 3"),
        ({"growth": "x"}, TypeError, "growth: found 'x'"),
        ({"growth": 0.9}, ValueError, r"growth: found 0\.9, expected a number of at least 1"),
        ({"growth": math.inf}, ValueError, "growth: found inf"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        mtu.Levels(**options)


def test_misuse_is_named() -> None:
    with pytest.raises(RuntimeError, match="nothing is known of data never seen"):
        mtu.Levels().left(LOSSES, MASK)
    levels = known()
    with pytest.raises(ValueError, match="no held-out loss for task 'c'"):
        levels.left({"c": LOSSES["a"]}, MASK)
    assert levels.left({"c": LOSSES["a"]}, False)["c"].tolist() == [K] * N
    with pytest.raises(TypeError, match="score: found float, expected"):
        levels.update(0.5)
    with pytest.raises(ValueError, match="score of task 'a' is not a number"):
        levels.update({"a": math.nan})
    with pytest.raises(ValueError, match="held-out loss of task 'loss' is not finite"):
        mtu.Levels().measure(
            nn.Linear(1, 1), [HELD_OUT / 0.0], lambda model, x: x, lambda model, x: {"loss": 0.0}
        )


@pytest.mark.parametrize("bad", [2, 4, 7, -1])
def test_numbers_that_are_no_kinds_are_refused(bad: int) -> None:
    model = Given([1.0] * N, [1.0] * N)
    kind = torch.zeros(N, dtype=torch.int8)
    kind[2] = bad
    with pytest.raises(ValueError, match=r"forget\['a'\]: found the numbers"):
        mtu.Engine(model).backward(model.losses(), mtu.OrthoGrad(), forget={"a": kind})
    assert model.p.grad is None
