"""Gradient ascent: weights by hand, against the reference, and what it is the same as."""

from __future__ import annotations

import torch

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, GradDiff, GradientAscent
from tests.helpers.matrices import conditioned, roles
from tests.helpers.truth import relative_error

R = roles([RETAIN, FORGET, RETAIN, FORGET, FORGET], [0, 0, 1, 1, 1])


def test_weights() -> None:
    assert torch.equal(
        GradientAscent()(None, R), torch.tensor([0, -1, 0, -0.5, -0.5], dtype=torch.float64)
    )
    assert torch.equal(GradientAscent().outside(R), GradientAscent()(None, R))


def test_is_the_reference() -> None:
    J = conditioned(5, 8, 10.0)
    truth = reference.gradient_ascent({"a": J[1:2], "b": J[3:]})
    assert relative_error(J.t() @ GradientAscent()(None, R), truth) < 1e-14


def test_is_graddiff_without_retain() -> None:
    assert torch.equal(GradientAscent()(None, R), GradDiff(0.0)(None, R))


def test_without_forget_rows_nothing_happens() -> None:
    assert torch.equal(
        GradientAscent()(None, roles([RETAIN] * 3)), torch.zeros(3, dtype=torch.float64)
    )
