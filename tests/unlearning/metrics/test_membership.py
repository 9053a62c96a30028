"""The attack guesses where there is nothing to know, and knows where everything shows."""

from __future__ import annotations

import math
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mtu_fast.unlearning.metrics import entropy, membership
from mtu_fast.unlearning.metrics.membership import _auc

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(n: int, mean: float = 0.0, seed: int = 0) -> Tensor:
    return mean + torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_identical_distributions_are_a_guess() -> None:
    found = membership(normal(1000, seed=1), normal(1000, seed=2))
    assert abs(found.auc - 0.5) < 4 * found.error
    assert found.accuracy == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_separated_distributions_are_known_whichever_is_larger(sign: float) -> None:
    low, high = sign * torch.linspace(0, 1, 40), sign * torch.linspace(3, 4, 40)
    found = membership(low, high)
    assert (found.accuracy, found.auc) == (1.0, 1.0)


def test_one_value_for_everybody_is_exactly_a_guess() -> None:
    found = membership(torch.full((20,), 0.25), torch.full((30,), 0.25))
    assert (found.accuracy, found.auc) == (0.5, 0.5)


def test_shifted_normals_have_the_auc_of_the_formula() -> None:
    """AUC of N(0, 1) against N(1, 1) is Φ(1 / √2)."""
    found = membership(normal(4000, seed=1), normal(4000, mean=1.0, seed=2))
    assert found.auc == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.02)


def test_the_standard_error_is_that_of_all_orders() -> None:
    """All 70 ways in which 4 and 4 samples can be ranked, equally likely by chance."""
    aucs = [(sum(ranks) - 6) / 16 for ranks in combinations(range(8), 4)]
    assert membership(normal(4), normal(4, seed=1)).error == pytest.approx(np.std(aucs))


def test_the_order_of_the_samples_does_not_matter() -> None:
    forget, test = normal(37, seed=1), normal(90, mean=0.5, seed=2)
    mixed = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    assert membership(forget.flip(0), test[mixed]) == membership(forget, test)


def test_a_seed_fixes_the_result_and_the_global_state_is_left_alone() -> None:
    forget, test = normal(30, seed=1), normal(90, mean=0.5, seed=2)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (
        membership(forget, test),
        membership(forget, test),
        membership(forget, test, seed=1),
    )
    assert first == again != other
    assert (
        torch.equal(states[0], torch.get_rng_state())
        and (states[1] == np.random.get_state()[1]).all()
    )


def test_classes_are_balanced_and_few_samples_mean_fewer_splits() -> None:
    found = membership(normal(500), normal(6))
    assert (found.samples, found.splits) == (6, 6)
    assert membership(normal(12), normal(500)).splits == 10


@pytest.mark.parametrize(
    ("forget", "test", "splits", "message"),
    [
        (torch.zeros(3), torch.zeros(50), 10, "found 3 forget and 50 test"),
        (torch.zeros(20, 1), torch.zeros(20), 10, r"forget has shape \(20, 1\)"),
        (
            torch.zeros(20),
            torch.tensor([0.0] * 19 + [math.nan]),
            10,
            r"test is not finite for samples \[19\]",
        ),
        (torch.zeros(20), torch.zeros(20), 1, "splits: found 1"),
    ],
)
def test_what_is_refused(forget: Tensor, test: Tensor, splits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        membership(forget, test, splits=splits)


def test_auc_is_that_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    positive, negative = (
        draw.integers(0, 9, 40).astype(float),
        draw.integers(-3, 6, 25).astype(float),
    )
    label, score = np.repeat([1, 0], [40, 25]), np.concatenate([positive, negative])
    assert _auc(positive, negative) == pytest.approx(roc_auc_score(label, score), rel=1e-12)


def test_without_scikit_learn_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install 'mtu_fast\[demo\]'"):
        membership(normal(10), normal(10, seed=1))


def test_entropy() -> None:
    """Uniform over 4: ln 4; certain: 0; (3/4, 1/4): ln 4 - 3/4 ln 3."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [900.0, 0.0, 0.0, 0.0]])
    assert entropy(logits).tolist() == pytest.approx([math.log(4), 0.0])
    assert entropy(torch.tensor([[math.log(3.0), 0.0]])).item() == pytest.approx(
        math.log(4) - 0.75 * math.log(3)
    )


def test_entropy_of_pixels_is_their_mean() -> None:
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, 0, 0, 1] = 900.0
    assert entropy(logits).tolist() == pytest.approx([math.log(2) / 2])
    with pytest.raises(ValueError, match=r"found shape \(3, 1\)"):
        entropy(torch.zeros(3, 1))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5)])
def test_no_sample_has_no_entropy(shape: tuple[int, ...]) -> None:
    assert entropy(torch.zeros(shape)).shape == (0,)
