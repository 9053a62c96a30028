"""Random labels: the weights, and how wrong the drawn answers are."""

from __future__ import annotations

import pytest
import torch

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, RandomLabels, random_labels, shuffled_targets
from tests.helpers.matrices import conditioned, roles, roles_of
from tests.helpers.truth import relative_error


def _seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("retain", "forget", "expected"),
    [(2, 1, [0.15, 0.15, 0.7]), (3, 0, [0.1, 0.1, 0.1]), (0, 2, [0.35, 0.35]), (0, 0, [])],
)
def test_weights(retain: int, forget: int, expected: list[float]) -> None:
    r = roles_of(retain, forget)
    found = RandomLabels(alpha=0.3)(None, r)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
    )
    assert torch.equal(found, RandomLabels(alpha=0.3).outside(r))


def test_is_the_reference() -> None:
    J, r = conditioned(5, 8, 10.0), roles([RETAIN, FORGET, RETAIN, FORGET, FORGET], [0, 0, 1, 1, 1])
    truth = reference.random_labels({"a": J[:1], "b": J[2:3]}, {"a": J[1:2], "b": J[3:]}, 0.3)
    assert relative_error(J.t() @ RandomLabels(0.3)(None, r), truth) < 1e-14


def test_no_label_is_true_and_all_others_occur_alike() -> None:
    target = torch.arange(5).repeat(4000)
    drawn = random_labels(target, 5, _seed(0))
    counts = torch.bincount(target * 5 + drawn, minlength=25).view(5, 5)
    assert (counts.diagonal() == 0).all()
    # 4000 draws over 4 labels: 1000 each, standard deviation 27.
    assert (counts[~torch.eye(5, dtype=torch.bool)] - 1000).abs().max() < 5 * 27.4


def test_two_classes_are_swapped() -> None:
    assert random_labels(torch.tensor([0, 1, 1]), 2).tolist() == [1, 0, 0]


def test_ignored_pixels_stay_ignored() -> None:
    target = torch.tensor([[-1, 0, 255], [2, 1, -1]], dtype=torch.int16)
    drawn = random_labels(target, 3, _seed(0))
    real = (target >= 0) & (target < 3)
    assert drawn.dtype == torch.int16
    assert torch.equal(drawn[~real], target[~real]) and (drawn[real] != target[real]).all()
    assert (drawn[real] >= 0).all() and (drawn[real] < 3).all()


@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_shuffled_targets_are_those_of_another(n: int) -> None:
    for seed in range(20):
        who = torch.arange(n, dtype=torch.float32)[:, None, None].expand(n, 2, 2)
        given = shuffled_targets(who, _seed(seed))
        assert (given[:, 0, 0] != who[:, 0, 0]).all()
        assert torch.equal(given[:, 0, 0].sort().values, who[:, 0, 0])


def test_every_other_sample_may_be_the_giver() -> None:
    giver = torch.stack([shuffled_targets(torch.arange(4), _seed(seed)) for seed in range(600)])
    counts = torch.stack([torch.bincount(giver[:, i], minlength=4) for i in range(4)])
    assert (counts.diagonal() == 0).all()
    # 600 draws over 3
    assert (counts[~torch.eye(4, dtype=torch.bool)] - 200).abs().max() < 5 * 11.6


def test_draws_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    target = torch.arange(30) % 7
    assert torch.equal(random_labels(target, 7, _seed(3)), random_labels(target, 7, _seed(3)))
    assert torch.equal(shuffled_targets(target, _seed(3)), shuffled_targets(target, _seed(3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"target is torch.float32.*shuffled_targets"):
        random_labels(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="classes: found 1, expected at least 2"):
        random_labels(torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"shape \(1, 4\).*N >= 2"):
        shuffled_targets(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"RandomLabels: alpha: found 1\.5"):
        RandomLabels(alpha=1.5)
