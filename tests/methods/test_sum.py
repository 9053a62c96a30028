"""Sum: mean gradients added up, as an ordinary backward does it."""

from __future__ import annotations

import torch

import mtu_fast as mtu
from mtu_fast.methods import FORGET, RETAIN, Sum
from tests.helpers.checks import clear, grad_vector, trained
from tests.helpers.matrices import roles
from tests.helpers.truth import relative_error
from tests.helpers.zoo import by_name

MASK = torch.tensor([True, False, False, True, False])


def test_task_rows_have_weight_one_and_forget_rows_minus_one() -> None:
    w = Sum()(None, roles([RETAIN, FORGET, RETAIN, FORGET], [0, 0, 1, 1]))
    assert w.tolist() == [1.0, -1.0, 1.0, -1.0]


def test_sample_rows_have_their_share_of_it() -> None:
    w = Sum()(None, roles([RETAIN, RETAIN, FORGET, RETAIN], [0, 0, 0, 1]))
    assert w.tolist() == [0.5, 0.5, -1.0, 1.0]


def test_is_one_backward_of_the_signed_means() -> None:
    model, forward = by_name("mlp").build(2, 5)
    params, losses = trained(model), forward()
    torch.stack([
        loss[~MASK].mean() - loss[MASK].mean() for loss in losses.values()
    ]).sum().backward()
    expected = grad_vector(params)
    clear(params)
    mtu.Engine(model).backward(forward(), mtu.Sum(), forget=MASK)
    assert relative_error(grad_vector(params), expected) <= 1e-12
