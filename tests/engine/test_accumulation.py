"""What is accumulated: `.grad`, micro-batches, and rows of two loaders."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from mtu_fast import reference
from tests.engine.small import MASK, N, backward_of, build
from tests.helpers.checks import (
    assert_rows,
    clear,
    grad_vector,
    trained,
    truth_of,
    twin,
)
from tests.helpers.truth import matrix, relative_error
from tests.helpers.zoo import by_name

# ---- accumulation --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:backward. .grad still holds:UserWarning")  # on purpose
@pytest.mark.parametrize("method", [mtu.Mean(), mtu.OrthoGrad(), mtu.PCGrad(), mtu.GradDiff()])
def test_grad_is_accumulated_into(method: mtu.Method) -> None:
    model, forward, params, _ = build()
    engine = mtu.Engine(model, params=model.backbone.parameters())
    engine.backward(forward(), method, forget=MASK)
    once = grad_vector(params)
    before = [p.grad for p in params]
    engine.backward(forward(), method, forget=MASK)
    assert relative_error(grad_vector(params), 2 * once) <= 1e-12
    assert all(p.grad is g for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("name", ["mlp", "conv2d", "layer_norm", "tied_language_model"])
def test_micro_batches_solved_once_are_the_full_batch(name: str) -> None:
    """Rows of several forwards of the same samples, in pieces of unequal size: the projection of the whole."""
    model, forward, params, engine = build(name, tasks=1)
    whole = forward()["a"]
    J = matrix(truth_of({"a": whole}, params))
    pieces = [torch.tensor([4, 0]), torch.tensor([1]), torch.tensor([2, 5, 3])]
    rows = []
    for piece in pieces:  # a sample alone gives the row it gives in a batch: forward all, keep some
        rows.append(engine.rows(forward()["a"][piece], forget=MASK[piece]))
    update = mtu.cat(*rows).backward(mtu.OrthoGrad(alpha=0.3))
    d = reference.orthograd({"a": J[~MASK]}, {"a": J[MASK]}, alpha=0.3)
    assert relative_error(grad_vector(params), d) <= 1e-9
    assert update.rank is not None and int(update.rank) == len(
        reference.independent(J[~MASK], 1e-7)
    )


def test_projections_of_micro_batches_do_not_add_up() -> None:
    """Why the rows are collected: two half projections are another update."""
    model, forward, params, engine = build(tasks=1)
    engine.backward(forward()["a"], mtu.OrthoGrad(), forget=MASK)
    whole = grad_vector(params)
    clear(params)
    with pytest.warns(UserWarning, match="do not add up"):
        for half in (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])):
            engine.backward(forward()["a"][half], mtu.OrthoGrad(), forget=MASK[half])
    assert relative_error(grad_vector(params) / 2, whole) > 1e-2


def test_gradients_own_their_memory() -> None:
    """Autograd hands the gradient of a + b to both, as one tensor, and that of a sum expanded."""
    model = nn.ParameterList([torch.ones(3), torch.ones(3)])
    engine, x = mtu.Engine(model), torch.randn(4, 3)
    for times in (1, 2):
        engine.backward((x * (model[0] + model[1])).sum(1), mtu.Mean())
        for p in model:
            assert relative_error(p.grad, times * x.mean(0)) <= 1e-6
    assert model[0].grad.untyped_storage().data_ptr() != model[1].grad.untyped_storage().data_ptr()


def test_a_gradient_of_a_sum_is_contiguous() -> None:
    model = nn.ParameterList([torch.ones(3)])
    mtu.Engine(model).backward(model[0].sum()[None], mtu.Mean())
    assert model[0].grad.is_contiguous()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # writes in place
    assert float(model[0].grad.norm()) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.PCGrad(), mtu.Mean()])
def test_a_sparse_gradient_is_accumulated_into(method: mtu.Method) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1)).double()
    engine, params, index = mtu.Engine(model), trained(model), torch.tensor([0, 2, 2, 4])
    engine.backward(model(index).squeeze(1), method)
    update = grad_vector(params)
    clear(params)
    model(index).sum().backward()
    assert model[0].weight.grad.is_sparse
    before = grad_vector(params)
    engine.backward(model(index).squeeze(1), method)
    assert relative_error(grad_vector(params), before + update) <= 1e-12


def test_an_embedding_with_sparse_gradients_has_one() -> None:
    """As after `backward()`, so that SparseAdam moves it."""
    model = nn.Embedding(9, 3, sparse=True)
    index, engine = torch.tensor([[0, 2], [2, 4], [7, 2]]), mtu.Engine(model)
    model(index).square().sum((1, 2)).mean().backward()
    plain = model.weight.grad.coalesce()
    for step in range(2):
        if step == 0:
            model.weight.grad = None
        engine.backward(model(index).square().sum((1, 2)), mtu.Mean())
        assert model.weight.grad.is_sparse
        torch.testing.assert_close(model.weight.grad.coalesce(), (step + 1) * plain)
    torch.optim.SparseAdam(model.parameters()).step()


@pytest.mark.parametrize(
    "table", [nn.Embedding(9, 3, sparse=True), nn.EmbeddingBag(9, 3, sparse=True)]
)
@pytest.mark.parametrize("outside", [False, True])
def test_sparse_gradients_within_and_outside(table: nn.Module, outside: bool) -> None:
    model = nn.ModuleDict({"table": table, "head": nn.Linear(3, 2)})
    engine = mtu.Engine(model, params=model["head"].parameters() if outside else None)
    for _step in range(2):
        h = model["table"](torch.tensor([[0, 2], [2, 4], [7, 2]]))
        loss = model["head"](h).flatten(1).square().sum(1)
        plain = torch.autograd.grad(loss.mean(), table.weight, retain_graph=True)[0].to_dense()
        clear(model.parameters())
        engine.backward(loss, torch.full((3,), 1 / 3))
        assert table.weight.grad.is_sparse
        assert relative_error(table.weight.grad.to_dense(), plain) <= 1e-6


def test_a_gradient_lies_in_memory_as_its_parameter_does() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mtu.Engine(model).backward(model(torch.randn(2, 3, 5, 5)).square().mean((1, 2, 3)), mtu.Mean())
    assert model.weight.grad.stride() == model.weight.stride() != model.weight.contiguous().stride()


def test_weights_that_require_grad() -> None:
    """They may come out of a computation that is differentiated; `.grad` is data, of the heads too."""
    model, forward, params, _ = build(tasks=1)
    engine = mtu.Engine(model, params=model.backbone.parameters())
    for _step in range(2):  # the first makes `.grad`, the second adds to it
        engine.rows(forward()).backward(torch.ones(N, requires_grad=True) * 2)
        assert not any(p.grad.requires_grad for p in params)


# ---- two loaders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["forget first", "retain first"])
def test_forget_and_retain_loaders(order: str) -> None:
    model, forward, _, _ = build(n=4)
    backbone, heads = trained(model.backbone), trained(model.heads)
    engine = mtu.Engine(model, params=model.backbone.parameters())
    lr, lf = forward(), twin(by_name("mlp"), model, 3, n=3)()
    J, K = matrix(truth_of(lr, backbone)), matrix(truth_of(lf, backbone))
    d = reference.orthograd(
        dict(zip(lr, J.split(4), strict=True)), dict(zip(lf, K.split(3), strict=True)), alpha=0.3
    )
    weighted = sum(
        0.3 * r.mean() - 0.7 * f.mean() for r, f in zip(lr.values(), lf.values(), strict=True)
    )
    plain = backward_of(weighted, heads)
    calls = [engine.rows(lf, forget=True), engine.rows(lr)]
    mtu.cat(*(calls if order == "forget first" else calls[::-1])).backward(mtu.OrthoGrad(alpha=0.3))
    assert relative_error(grad_vector(backbone), d) <= 1e-9
    assert relative_error(grad_vector(heads), plain) <= 1e-12


def test_rows_of_different_tasks_meet_by_name() -> None:
    model, forward, params, engine = build()
    first, second = forward(), forward()
    chosen = {"c": second["c"], "a": second["a"]}
    J = truth_of(first, params)
    K = truth_of(chosen, params)
    both = mtu.cat(engine.rows(first), engine.rows(chosen))
    assert both.roles.tasks == ("a", "b", "c")
    assert both.roles.task.tolist() == [0] * N + [1] * N + [2] * N + [2] * N + [0] * N
    assert_rows(both, {j: torch.cat([J[j], K[j]]) for j in J}, params, 1e-12)


def test_one_shared_graph_in_two_calls() -> None:
    """Tasks on one forward cannot be handed over one by one: a call uses the graph up, the first like any later."""
    _, forward, _, engine = build()
    for _step in range(2):
        losses = forward()
        engine.rows(losses["a"])
        with pytest.raises(RuntimeError, match="used up by an earlier rows"):
            engine.rows(losses["b"])
