"""Distances between outputs: literal values, and the properties that make them distances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtu_fast.unlearning.metrics import kl_divergence, logit_distance

SHAPES = [(5, 3), (4, 3, 2, 6)]


def logits(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_kl_literal_value() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2."""
    p, q = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert kl_divergence(p, q).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7
    )
    assert kl_divergence(q, p).item() == pytest.approx(
        0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-7
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_that_of_torch_averaged_over_pixels(shape: tuple[int, ...]) -> None:
    p, q = logits(shape, 1).double(), logits(shape, 2).double()
    each = torch.nn.functional.kl_div(
        q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    torch.testing.assert_close(
        kl_divergence(p, q), each.reshape(shape[0], -1).mean(1), rtol=1e-12, atol=1e-14
    )
    assert (kl_divergence(p, q) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_is_no_distance_from_itself(shape: tuple[int, ...]) -> None:
    z = logits(shape)
    assert torch.equal(kl_divergence(z, z), torch.zeros(shape[0], dtype=torch.float64))
    assert torch.equal(logit_distance(z, z), torch.zeros(shape[0], dtype=torch.float64))


def test_kl_does_not_see_what_softmax_does_not_see_and_logit_distance_does() -> None:
    p, q = logits((6, 4), 1), logits((6, 4), 2)
    torch.testing.assert_close(
        kl_divergence(p, q.double() + 5), kl_divergence(p, q), rtol=1e-12, atol=1e-14
    )
    assert logit_distance(q, q.double() + 5).tolist() == pytest.approx([10.0] * 6)  # 5 √4


def test_kl_of_a_certainty_that_is_wrong_is_finite() -> None:
    assert kl_divergence(torch.tensor([[800.0, 0.0]]), torch.tensor([[0.0, 800.0]])).item() == 800.0


def test_logit_distance_literal_values() -> None:
    a, b = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 3.0]])
    assert logit_distance(a, b).tolist() == [5.0, 2.0]
    depth = torch.tensor([[[[1.0, 2.0]]]])
    assert logit_distance(depth, torch.tensor([[[[1.5, 4.0]]]])).tolist() == [1.25]


@pytest.mark.parametrize("distance", [kl_divergence, logit_distance])
def test_what_is_refused(distance: object) -> None:
    assert callable(distance)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(3, 2\)"):
        distance(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"expected \[N, C, ...\]"):
        distance(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"samples \[1\] are not finite"):
        distance(torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, math.nan]]))


def test_kl_needs_classes() -> None:
    with pytest.raises(ValueError, match="two classes"):
        kl_divergence(torch.zeros(2, 1), torch.zeros(2, 1))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5)])
def test_no_sample_has_no_distance(shape: tuple[int, ...]) -> None:
    nothing = torch.zeros(shape)
    assert kl_divergence(nothing, nothing).shape == logit_distance(nothing, nothing).shape == (0,)
