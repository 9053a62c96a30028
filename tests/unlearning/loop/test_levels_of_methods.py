"""What methods make of levels: their weights and mean rows are of what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.unlearning.loop.levels import LOSSES, MASK, Given, N, known

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(method: mtu.Method, forget: Any) -> Tensor:
    model = Given(LOSSES["a"].tolist(), LOSSES["b"].tolist())
    mtu.Engine(model).backward(model.losses(), method, forget=forget)
    assert model.p.grad is not None
    return model.p.grad


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(0.0), mtu.GradDiff(0.0), mtu.GradientAscent()], ids=repr
)
def test_methods_of_sample_rows_weigh_what_is_left_by_all(method: mtu.Method) -> None:
    """-1 / n_t: here every row is its own direction, so that the gradient is the weights."""
    found = gradients(method, known().left(LOSSES, MASK))
    expected = torch.tensor([[-0.25, -0.25, 0, 0, 0, 0], [0, -0.25, -0.25, 0, 0, 0]]).double()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "method",
    [mtu.MUNBa(), mtu.PCGrad(), mtu.UPGrad(), mtu.MGDA(), mtu.CAGrad(), mtu.GradVac(), mtu.GDRGMA(),
     mtu.IMTLG(), mtu.NashMTL(), mtu.FairGrad(), mtu.AlignedMTL(), mtu.DualProj()],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_methods_of_mean_rows_get_the_mean_of_what_is_left(method: mtu.Method) -> None:
    """The same as where the others have no label."""
    found = gradients(method, known().left(LOSSES, MASK))
    model = Given(LOSSES["a"].tolist(), LOSSES["b"].tolist())
    there = {task: loss < 3.0 for task, loss in LOSSES.items()}
    for loss in there.values():
        loss[~MASK] = True
    mtu.Engine(model).backward(model.losses(), method, forget=MASK, present=there)
    assert model.p.grad is not None
    torch.testing.assert_close(found, model.p.grad, rtol=1e-12, atol=1e-15)
    assert not found[0, 2:4].any() and found[0, :2].all()


class Counting(mtu.Method):
    """A method of somebody's own, which knows of no levels."""

    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        return -(roles.kind == mtu.FORGET).double()


def test_a_method_of_ones_own_gives_no_weight_to_what_rests() -> None:
    found = gradients(Counting(), known().left(LOSSES, MASK))
    assert found[0].tolist() == [-1, -1, 0, 0, 0, 0]


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.5), mtu.GradDiff(0.5), mtu.PCGrad()], ids=repr)
def test_where_all_rests_a_step_is_one_on_the_retained_data(method: mtu.Method) -> None:
    levels = known()
    levels.update({"a": 0.0, "b": 0.0})
    found = gradients(method, levels.left(LOSSES, MASK))
    assert not found[:, :4].any() and (found[:, 4:] > 0).all()


def test_heads_follow_what_is_left() -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "head": nn.Linear(4, 1)}).double()
    x = torch.randn(N, 3, dtype=torch.float64)
    loss = model["head"](model["body"](x))[:, 0].square()
    level = float(loss.detach()[:4].median()) + 1e-9
    levels = mtu.Levels().measure(nn.Linear(1, 1), [torch.full((2,), level)], lambda model, x: x)
    still = (loss < level) & MASK
    engine = mtu.Engine(model, model["body"].parameters())
    engine.backward(loss, mtu.OrthoGrad(0.5), forget=levels.left(loss, MASK))
    loss = model["head"](model["body"](x))[:, 0].square()
    total = 0.5 * loss[~MASK].mean() - 0.5 * (loss * still).sum() / 4
    for p, g in zip(
        model["head"].parameters(),
        torch.autograd.grad(total, list(model["head"].parameters())),
        strict=True,
    ):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
