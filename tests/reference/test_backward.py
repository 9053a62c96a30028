"""The slow drop-in: from losses to `.grad`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mtu_fast import reference
from mtu_fast.reference import base
from tests.helpers.truth import jacobian, matrix, relative_error
from tests.helpers.zoo import by_name

MASK = torch.tensor([True, False, False, True, False, False])


def _build(tasks: int = 2) -> tuple[nn.Module, list[Tensor], list[Tensor], dict[str, Tensor]]:
    model, losses_fn = by_name("mlp").build(tasks, 6)
    return model, list(model.backbone.parameters()), list(model.heads.parameters()), losses_fn()


def _grads(params: list[Tensor]) -> Tensor:
    return torch.cat([p.grad.flatten() for p in params if p.grad is not None])


def _plain(weighted: Tensor, params: list[Tensor]) -> Tensor:
    return torch.cat([
        g.flatten() for g in torch.autograd.grad(weighted, params, retain_graph=True)
    ])


def test_jacobian_is_one_backward_per_row() -> None:
    _, params, _, losses = _build()
    assert torch.equal(
        reference.flatten(reference.jacobian(losses, params)), matrix(jacobian(losses, params))
    )


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


@pytest.mark.parametrize(
    "forget", [True, torch.ones(6, dtype=torch.bool), {"loss": torch.ones(6, dtype=torch.bool)}]
)
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
    with pytest.raises(ValueError, match=r"method is 'sgd', expected one of .*ascent, .*orthograd"):
        reference.backward(params, losses, "sgd")
    assert all(p.grad is None for p in params)


def test_refuses_an_unknown_option() -> None:
    _, params, _, losses = _build()
    with pytest.raises(
        TypeError, match="'orthograd' has no option beta; its options are: alpha, tol"
    ):
        reference.backward(params, losses, forget=MASK, beta=0.5)
    assert all(p.grad is None for p in params)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="two references for mean"):
        type("Other", (base.Reference,), {}, called="mean")


def _seen(
    monkeypatch: pytest.MonkeyPatch, **options: object
) -> tuple[list[reference.Sides], list[Tensor]]:
    """The sides that a method of two blocks, which returns ones, is given; and the gradients of the heads."""
    seen: list[reference.Sides] = []

    monkeypatch.setattr(base, "METHODS", dict(base.METHODS))

    @dataclass(frozen=True)
    class Own(base.Reference, called="own"):
        tau: float = 2.0

        def direction(self, sides: reference.Sides) -> Tensor:
            seen.append(sides)
            return torch.ones_like(sides.retain["a"][0])

        def outside(self, sides: reference.Sides, task: str) -> base.Pair:
            return 1.0, (self.tau - sides.forget_loss[task].mean()).relu()

    _, params, heads, losses = _build()
    reference.backward(
        params, losses, "own", forget={"a": MASK}, outside=heads, blocks=[[0], [1, 2, 3]], **options
    )
    assert all((p.grad == 1.0).all() for p in params)
    weighted = losses["b"].mean() + losses["a"][~MASK].mean()
    tau = float(options.get("tau", 2.0))
    weighted = (
        weighted - (tau - losses["a"][MASK].detach().mean()).relu() * losses["a"][MASK].mean()
    )
    assert relative_error(_grads(heads), _plain(weighted, heads)) <= 1e-13
    return seen, [matrix({0: stack}) for stack in reference.jacobian(losses, params)]


def test_a_direction_sees_rows_and_losses_by_role_and_task(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second), J = _seen(monkeypatch, tau=5.0)
    whole = torch.cat(J[1:], 1)
    for sides, rows in ((first, J[0]), (second, whole)):
        assert torch.equal(sides.retain["a"], rows[:6][~MASK]) and torch.equal(
            sides.forget["a"], rows[:6][MASK]
        )
        assert torch.equal(sides.retain["b"], rows[6:]) and sides.forget["b"].shape == (
            0,
            rows.shape[1],
        )
        assert [
            len(loss) for loss in (*sides.retain_loss.values(), *sides.forget_loss.values())
        ] == [4, 6, 2, 0]
        assert sides.subspace is None
    means = {("retain", "a"): whole[:6][~MASK].mean(0), ("forget", "a"): -whole[:6][MASK].mean(0)}
    assert list(second.signed_means()) == [*means, ("retain", "b")]
    assert torch.equal(second.signed_matrix()[:2], torch.stack(list(means.values())))


def test_a_direction_sees_the_blocks_columns_of_the_subspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, params, _, _ = _build()
    rows = torch.randn(3, sum(p.numel() for p in params), dtype=torch.float64)
    (first, second), _ = _seen(monkeypatch, subspace=rows)
    cut = params[0].numel()
    assert torch.equal(first.subspace, rows[:, :cut]) and torch.equal(
        second.subspace, rows[:, cut:]
    )


def test_rows_without_a_task_have_no_means() -> None:
    nothing = reference.Sides({"a": torch.zeros(0, 3)}, {"a": torch.zeros(0, 3)}, {}, {})
    assert nothing.signed_means() == {} and nothing.signed_matrix().shape == (0, 3)
