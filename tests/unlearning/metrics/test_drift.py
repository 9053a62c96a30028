"""Drift: literal values, numpy's quantiles, and nothing that the order of the samples decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mtu_fast.unlearning.metrics import QUANTILES, drift


def losses(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def test_literal_values() -> None:
    before = torch.tensor([1.0, 0.0, 2.0, 0.5])
    after = torch.tensor([1.5, 0.0, 1.0, 3.5])  # changes 0.5, 0, -1, 3
    found = drift(before, after, torch.tensor([7, 7, 2, 2]), worst=2)
    assert (found.samples, found.mean, found.worst_mean) == (4, 0.625, 3.0)
    assert found.worst == ((3, 3.0), (0, 0.5))
    assert found.worst_class == (2, 1.0)  # (-1 + 3) / 2; class 7 has 0.25
    assert found.quantiles[3] == 0.25  # the median of -1, 0, 0.5, 3


@pytest.mark.parametrize("n", [1, 2, 57, 1000])
def test_quantiles_are_those_of_numpy(n: int) -> None:
    before, after = losses(n, 1), losses(n, 2)
    found = drift(before, after)
    expected = np.quantile(after.double().numpy() - before.double().numpy(), QUANTILES)
    assert found.quantiles == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("n", "worst"), [(99, 1), (100, 1), (101, 2), (1000, 10)])
def test_the_worst_percent_is_rounded_up(n: int, worst: int) -> None:
    change = torch.arange(n, dtype=torch.float64)
    assert drift(torch.zeros(n), change).worst_mean == pytest.approx(n - 1 - (worst - 1) / 2)


def test_nothing_moved() -> None:
    found = drift(losses(20, 0), losses(20, 0))
    assert (found.mean, found.worst_mean, set(found.quantiles)) == (0.0, 0.0, {0.0})
    assert found.worst_class is None


def test_the_order_of_the_samples_changes_nothing_but_their_indices() -> None:
    before, after, labels = losses(64, 1), losses(64, 2), torch.arange(64) % 5
    mixed = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    one, other = drift(before, after, labels), drift(before[mixed], after[mixed], labels[mixed])
    assert other.quantiles == one.quantiles and other.worst_mean == one.worst_mean
    assert other.mean == pytest.approx(one.mean, rel=1e-12)
    assert [(int(mixed[i]), change) for i, change in other.worst] == list(one.worst)
    assert other.worst_class[0] == one.worst_class[0]


def test_differences_are_taken_in_float64() -> None:
    before, after = torch.tensor([1.0]), torch.tensor([1.0 + 2**-23])
    assert drift(before, after).mean == 2**-23
    half = torch.tensor([60000.0], dtype=torch.float16)
    assert drift(-half, half).mean == 120000.0


@pytest.mark.parametrize(
    ("before", "after", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(4), None, r"before has shape \(3,\) and after \(4,\)"),
        (torch.zeros(0), torch.zeros(0), None, "N > 0"),
        (torch.zeros(2, 2), torch.zeros(2, 2), None, r"expected \[N\]"),
        (torch.zeros(2), torch.tensor([0.0, math.inf]), None, r"samples \[1\] are not finite"),
        (torch.zeros(2), torch.zeros(2), torch.zeros(2), "labels are torch.float32"),
        (
            torch.zeros(2),
            torch.zeros(2),
            torch.zeros(2, 3, dtype=torch.long),
            r"expected integers \[2\]",
        ),
    ],
)
def test_what_is_refused(
    before: Tensor, after: Tensor, labels: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        drift(before, after, labels)
