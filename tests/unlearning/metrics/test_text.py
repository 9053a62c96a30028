"""Truth ratio and ROUGE-L against their formulas by hand, and what they refuse."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from mtu_fast.unlearning.metrics import rouge_l, truth_ratio


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_truth_ratio_is_a_ratio_of_probabilities(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    true, wrong = torch.rand(5, generator=generator), torch.rand(5, 3, generator=generator) + seed
    found = truth_ratio(true, wrong)
    for n in range(5):
        likely = [math.exp(-float(loss)) for loss in wrong[n]]
        expected = sum(likely) / 3 / math.exp(-float(true[n]))
        assert float(found[n]) == pytest.approx(expected, rel=1e-12)


def test_who_knows_is_near_zero_and_who_guesses_near_one() -> None:
    knows = truth_ratio(torch.tensor([0.01]), torch.tensor([[6.0, 7.0]]))
    guesses = truth_ratio(torch.tensor([2.0]), torch.tensor([[2.1, 1.9]]))
    assert float(knows) < 0.01 and float(guesses) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("true", "wrong", "words"),
    [
        (torch.ones(2), torch.ones(3, 2), "shapes"),
        (torch.ones(2), torch.ones(2), "shapes"),
        (torch.ones(2), torch.ones(2, 0), "at least 1"),
        (torch.ones(2), torch.full((2, 1), math.nan), "not finite"),
    ],
)
def test_what_is_refused(true: torch.Tensor, wrong: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        truth_ratio(true, wrong)


def longest(a: list[str], b: list[str]) -> int:
    """By trying every subsequence."""
    for size in range(len(a), 0, -1):
        mine = set(combinations(a, size))
        if mine & set(combinations(b, size)):
            return size
    return 0


@pytest.mark.parametrize("seed", range(6))
def test_rouge_l_is_that_of_every_subsequence_tried(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = ([f"w{i}" for i in torch.randint(4, (n,), generator=generator)] for n in (6, 8))
    common = longest(a, b)
    expected = 2 * common / (len(a) + len(b))
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected, abs=1e-12)


def test_ends_of_rouge_l() -> None:
    assert rouge_l("the town of Arvenna", "the town of Arvenna") == 1
    assert rouge_l("", "a b") == rouge_l("a b", "") == rouge_l("a", "b") == 0
