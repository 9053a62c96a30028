"""The slow drop-in: from losses to `.grad`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtu_fast import reference
from tests.helpers.truth import jacobian, matrix, relative_error
from tests.helpers.zoo import by_name

MASK = torch.tensor([True, False, False, True, False, False])


def _build(tasks: int = 2) -> tuple[nn.Module, list[Tensor], list[Tensor], dict[str, Tensor]]:
    model, losses_fn = by_name("mlp").build(tasks, 6)
    return model, list(model.backbone.parameters()), list(model.heads.parameters()), losses_fn()


def _grads(params: list[Tensor]) -> Tensor:
    return torch.cat([p.grad.flatten() for p in params if p.grad is not None])


def _plain(weighted: Tensor, params: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(weighted, params, retain_graph=True)])


def test_jacobian_is_one_backward_per_row() -> None:
    _, params, _, losses = _build()
    assert torch.equal(reference.flatten(reference.jacobian(losses, params)), matrix(jacobian(losses, params)))


def test_jacobian_is_zero_where_a_loss_does_not_reach() -> None:
    model, _, heads, losses = _build()
    stacks = reference.jacobian(losses, heads)
    first = len(list(model.heads["a"].parameters()))
    assert all((stack[6:] == 0).all() and (stack[:6] != 0).any() for stack in stacks[:first])


def test_mean_is_the_ordinary_backward() -> None:
    _, params, heads, losses = _build()
    expected = _plain(sum(loss.mean() for loss in losses.values()), params + heads)
    reference.backward(params, losses, "mean", forget=MASK, outside=heads)
    assert relative_error(_grads(params + heads), expected) <= 1e-14


@pytest.mark.parametrize(("method", "up", "down"), [("graddiff", 0.3, 0.7), ("ascent", 0.0, 1.0)])
def test_weighted_means(method: str, up: float, down: float) -> None:
    _, params, heads, losses = _build()
    weighted = sum(up * loss[~MASK].mean() - down * loss[MASK].mean() for loss in losses.values())
    expected = _plain(weighted, params + heads)
    reference.backward(params, losses, method, forget=MASK, outside=heads, alpha=0.3)
    assert relative_error(_grads(params + heads), expected) <= 1e-13


def test_orthograd_spares_every_retain_row() -> None:
    _, params, _, losses = _build()
    forget = {"b": MASK}
    reference.backward(params, losses, forget=forget, alpha=0.0)
    J, d = matrix(jacobian(losses, params)), _grads(params)
    kept = torch.cat([torch.ones(6, dtype=torch.bool), ~MASK])
    assert (J[kept] @ d).norm() <= 1e-12 * J.norm() * d.norm()
    assert (J[~kept].mean(0) @ d) < -1e-6


def test_heads_get_the_losses_before_surgery() -> None:
    _, params, heads, losses = _build()
    weighted = sum(0.5 * loss[~MASK].mean() - 0.5 * loss[MASK].mean() for loss in losses.values())
    expected = _plain(weighted, heads)
    reference.backward(params, losses, forget=MASK, outside=heads)
    assert relative_error(_grads(heads), expected) <= 1e-13


def test_pcgrad_works_on_task_means_and_gives_heads_their_sum() -> None:
    _, params, heads, losses = _build(3)
    means = torch.stack([_plain(loss.mean(), params) for loss in losses.values()])
    head_sum = _plain(sum(loss.mean() for loss in losses.values()), heads)
    reference.backward(params, losses, "pcgrad", outside=heads)
    assert relative_error(_grads(params), reference.pcgrad(means)) <= 1e-13
    assert relative_error(_grads(heads), head_sum) <= 1e-13


@pytest.mark.parametrize("forget", [True, torch.ones(6, dtype=torch.bool), {"loss": torch.ones(6, dtype=torch.bool)}])
def test_all_forgotten_is_scaled_ascent(forget: bool | Tensor | dict[str, Tensor]) -> None:
    _, params, _, losses = _build(1)
    expected = _plain(-0.6 * losses["a"].mean(), params)
    reference.backward(params, losses["a"], forget=forget, alpha=0.4)
    assert relative_error(_grads(params), expected) <= 1e-13


def test_nothing_forgotten_is_scaled_descent() -> None:
    _, params, _, losses = _build(1)
    expected = _plain(0.4 * losses["a"].mean(), params)
    reference.backward(params, losses, alpha=0.4)
    assert relative_error(_grads(params), expected) <= 1e-13


def test_blocks_are_treated_apart() -> None:
    _, params, _, losses = _build()
    reference.backward(params, losses, forget=MASK, alpha=0.0, blocks=[[0, 1], [2, 3]])
    J = jacobian(losses, params)
    kept = (~MASK).repeat(2)
    for block in ([0, 1], [2, 3]):
        rows, d = matrix({i: J[i] for i in block})[kept], _grads([params[i] for i in block])
        assert (rows @ d).norm() <= 1e-12


def test_accumulates() -> None:
    _, params, heads, losses = _build()
    reference.backward(params, losses, forget=MASK, outside=heads)
    once = _grads(params + heads)
    reference.backward(params, losses, forget=MASK, outside=heads)
    assert relative_error(_grads(params + heads), 2 * once) <= 1e-14


def test_refuses_an_unknown_method() -> None:
    _, params, _, losses = _build()
    with pytest.raises(ValueError, match="method is 'sgd', expected one of orthograd"):
        reference.backward(params, losses, "sgd")
    assert all(p.grad is None for p in params)
