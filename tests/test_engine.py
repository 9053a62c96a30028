"""What a training loop sees: the equivalences, accumulation, missing labels, granularity, an untouched model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast import reference
from tests.helpers.checks import (
    assert_rows,
    clear,
    grad_vector,
    random_weights,
    trained,
    truth_of,
    twin,
    vector,
)
from tests.helpers.models.base import Forward, MultiTask
from tests.helpers.truth import combine_truth, gram_truth, matrix, relative_error
from tests.helpers.zoo import by_name

N = 6
MASK = torch.tensor([True, False, False, True, False, False])


def build(
    name: str = "mlp", tasks: int = 3, n: int = N
) -> tuple[MultiTask, Forward, list[Tensor], mtu.Engine]:
    model, forward = by_name(name).build(tasks, n)
    return model, forward, trained(model), mtu.Engine(model)


def backward_of(loss: Any, params: Sequence[Tensor]) -> Tensor:
    """The gradient of one number, end to end; the graph is kept."""
    return vector(torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True), params)


# ---- equivalences --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mlp", "conv2d", "embedding_sparse", "vit", "batch_norm_train", "contrastive"]
)
def test_mean_is_the_ordinary_backward(name: str) -> None:
    _, forward, params, engine = build(name)
    losses = forward()
    expected = backward_of(sum(loss.mean() for loss in losses.values()), params)
    update = engine.backward(losses, mtu.Mean(), forget=MASK)
    assert relative_error(grad_vector(params), expected) <= 1e-13
    assert update.gram is None and update.rank is None and len(update.weights) == 3 * N


def test_mean_of_rows_is_the_ordinary_backward() -> None:
    _, forward, params, engine = build()
    losses = forward()
    expected = backward_of(sum(loss.mean() for loss in losses.values()), params)
    engine.rows(losses, forget=MASK).backward(mtu.Mean())
    assert relative_error(grad_vector(params), expected) <= 1e-12


@pytest.mark.parametrize("forget", [MASK, {"b": MASK}, True, None])
def test_graddiff_is_a_weighted_backward(forget: Any) -> None:
    _, forward, params, engine = build()
    losses = forward()
    reference.backward(params, losses, "graddiff", forget=forget, alpha=0.3)
    expected = grad_vector(params)
    clear(params)
    engine.backward(losses, mtu.GradDiff(alpha=0.3), forget=forget)
    assert relative_error(grad_vector(params), expected) <= 1e-12


@pytest.mark.parametrize("name", ["mlp", "batch_norm_train", "contrastive", "gru"])
@pytest.mark.parametrize("forget", [None, MASK, {"a": MASK, "c": ~MASK}])
def test_pcgrad_is_the_loop_of_the_paper(name: str, forget: Any) -> None:
    """On mean rows, which are exact where samples are coupled too (BatchNorm in train mode)."""
    model, forward, _, _ = build(name)
    backbone, heads = trained(model.backbone), trained(model.heads)
    losses = forward()
    reference.backward(backbone, losses, "pcgrad", forget=forget, outside=heads)
    expected = grad_vector([*backbone, *heads])
    clear(model.parameters())
    engine = mtu.Engine(model, params=model.backbone.parameters())
    update = engine.backward(losses, mtu.PCGrad(), forget=forget)
    assert relative_error(grad_vector([*backbone, *heads]), expected) <= 1e-12
    assert (update.roles.sample == -1).all()
    kinds = 1 if forget is None else 2
    assert len(update.roles) == {1: 3, 2: 6 if isinstance(forget, Tensor) else 5}[kinds]


def test_pcgrad_conflicts_are_there() -> None:
    """The case above is no empty one: PCGrad differs from the plain sum."""
    model, forward, _, _ = build("mlp")
    params = trained(model.backbone)
    losses = forward()
    plain = backward_of(sum(loss.mean() for loss in losses.values()), params)
    mtu.Engine(model, params=params).backward(losses, mtu.PCGrad(), forget=MASK)
    assert relative_error(grad_vector(params), plain) > 1e-2


@pytest.mark.parametrize("granularity", ["layer", "tensor"])
def test_orthograd_per_block(granularity: str) -> None:
    model, forward, _, _ = build("mlp_3d_no_bias" if granularity == "tensor" else "conv2d", tasks=1)
    backbone, heads = trained(model.backbone), trained(model.heads)
    names = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    keys = [name if granularity == "tensor" else name.rpartition(".")[0] for name in names]
    blocks = [[j for j, key in enumerate(keys) if key == wanted] for wanted in dict.fromkeys(keys)]
    assert len(blocks) == 2
    losses = forward()
    reference.backward(
        backbone, losses, forget=MASK, outside=heads, alpha=0.3, tol=1e-7, blocks=blocks
    )
    expected = grad_vector([*backbone, *heads])
    clear(model.parameters())
    update = mtu.Engine(model, params=model.backbone.parameters()).backward(
        losses, mtu.OrthoGrad(alpha=0.3, granularity=granularity), forget=MASK
    )
    assert relative_error(grad_vector([*backbone, *heads]), expected) <= 1e-9
    assert update.weights.shape == (2, N)
    assert update.gram is not None and update.gram.shape == (2, N, N)
    assert update.rank is not None and update.rank.tolist() == [4, 4]


def test_rows_per_task_have_the_gram_of_the_means() -> None:
    _, forward, params, engine = build()
    losses = forward()
    J = truth_of(losses, params)
    rows = engine.rows(losses, forget={"b": MASK}, per="task")
    w = torch.zeros(4, 3 * N, dtype=torch.float64)
    w[0, :N], w[3, 2 * N :] = 1 / N, 1 / N
    w[1, N : 2 * N][~MASK], w[2, N : 2 * N][MASK] = 1 / 4, 1 / 2
    means = {j: torch.einsum("mr,r...->m...", w, stack) for j, stack in J.items()}
    assert_rows(rows, means, params, 1e-12)
    assert rows.roles.kind.tolist() == [mtu.RETAIN, mtu.RETAIN, mtu.FORGET, mtu.RETAIN]
    assert torch.allclose(
        rows.roles.loss, w @ torch.cat(list(losses.values())).detach(), rtol=1e-14
    )


def test_one_tensor_of_losses_is_one_task() -> None:
    _, forward, params, engine = build(tasks=1)
    losses = forward()["a"]
    rows = engine.rows(losses)
    assert rows.roles.tasks == ("loss",)
    assert repr(rows) == "Rows(6 rows: 0 to forget, tasks loss)"


def test_weights_are_a_method() -> None:
    model, forward, params, engine = build()
    losses = forward()
    w = random_weights(3 * N)
    expected = vector(combine_truth(truth_of(losses, params), w).values(), params)
    update = engine.backward(losses, w)
    assert relative_error(grad_vector(params), expected) <= 1e-12
    assert update.weights is w and update.gram is None


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


# ---- labels that are not there -------------------------------------------------------------------


def test_absent_labels_give_no_rows() -> None:
    _, forward, params, engine = build()
    present = {"a": MASK, "c": torch.tensor([True, True, False, True, True, True])}
    losses = forward()
    there = torch.cat([present["a"], torch.ones(N, dtype=torch.bool), present["c"]])
    J = {j: stack[there] for j, stack in truth_of(losses, params).items()}
    rows = engine.rows(losses, forget={"c": MASK}, present=present)
    assert len(rows) == 2 + 6 + 5
    assert rows.roles.sample.tolist() == [0, 3, *range(6), 0, 1, 3, 4, 5]
    assert rows.roles.kind.tolist() == [0] * 8 + [1, 0, 1, 0, 0]
    assert_rows(rows, J, params, 1e-12)


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(0.3), mtu.PCGrad(), mtu.GradDiff(0.3), mtu.Mean()]
)
def test_absent_labels_count_for_nothing(method: mtu.Method) -> None:
    """The same update as from losses that never held those samples."""
    model, forward, params, _ = build(tasks=1)
    engine = mtu.Engine(model, params=model.backbone.parameters())
    keep = torch.tensor([True, True, False, True, True, False])
    engine.backward(forward(), method, forget=MASK, present={"a": keep})
    found = grad_vector(params)
    clear(params)
    engine.backward({"a": forward()["a"][keep]}, method, forget=MASK[keep])
    assert relative_error(found, grad_vector(params)) <= 1e-9


def test_a_task_without_any_label() -> None:
    model, forward, params, engine = build()
    losses = forward()
    nobody = torch.zeros(N, dtype=torch.bool)
    J = truth_of({"a": losses["a"], "c": losses["c"]}, params)
    rows = engine.rows(losses, present={"b": nobody})
    assert_rows(rows, J, params, 1e-12)
    means = engine.rows(forward(), present={"b": nobody}, per="task")
    assert [means.roles.tasks[t] for t in means.roles.task] == ["a", "c"]


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_absent_sample_whose_gradient_is_undefined(earlier: int) -> None:
    """The square root of zero: its loss is finite, its gradient is not, and nobody asks for it."""
    _, forward, params, engine = build(tasks=1)
    keep = torch.tensor([True, False, True, True, True, True])

    def roots(at_zero: bool) -> Tensor:
        loss = forward()["a"]
        return (loss - loss.detach() * ~keep if at_zero else loss).sqrt()

    for _call in range(earlier):
        engine.rows({"a": roots(False)})
    J = truth_of({"a": roots(False)[keep]}, params)
    rows = engine.rows({"a": roots(True)}, forget=MASK, present={"a": keep})
    assert_rows(rows, J, params, 1e-12)
    rows.backward(mtu.OrthoGrad(alpha=0.3))
    found = grad_vector(params)
    clear(params)
    engine.backward(roots(False)[keep], mtu.OrthoGrad(alpha=0.3), forget=MASK[keep])
    assert relative_error(found, grad_vector(params)) <= 1e-9


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(0.3), mtu.PCGrad(), mtu.GradDiff(0.3), mtu.Mean()]
)
def test_a_task_without_any_label_counts_for_nothing(method: mtu.Method) -> None:
    model, forward, params, _ = build()
    engine = mtu.Engine(model, params=model.backbone.parameters())
    nobody = torch.zeros(N, dtype=torch.bool)
    update = engine.backward(forward(), method, forget=MASK, present={"b": nobody})
    assert {update.roles.tasks[t] for t in update.roles.task} == {"a", "c"}
    found = grad_vector(params)
    clear(params)
    losses = forward()
    engine.backward({"a": losses["a"], "c": losses["c"]}, method, forget=MASK)
    assert relative_error(found, grad_vector(params)) <= 1e-9


# ---- what the update does ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "vit", "layer_norm"])
def test_the_direction_changes_no_retain_loss_to_first_order(name: str) -> None:
    """Central differences along d: forget losses rise along -d, retain losses stand still."""
    model, forward, params, engine = build(name, tasks=1, n=4)
    forget = torch.tensor([True, False, False, True])
    engine.backward(forward(), mtu.OrthoGrad(alpha=0.0), forget=forget)
    d = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in params]
    size = float(torch.stack([g.norm() for g in d]).norm())
    start = [p.detach().clone() for p in params]
    h = 1e-5 / size
    with torch.no_grad():
        ends = []
        for sign in (-1, 1):
            for p, p0, g in zip(params, start, d, strict=True):
                p.copy_(p0 + sign * h * g)
            ends.append(forward()["a"].clone())
    slope = (ends[1] - ends[0]) / (2 * h * size)
    J = matrix(truth_of({"a": _restored(params, start, forward)}, params))
    assert (slope[~forget].abs() <= 1e-7 * J[~forget].norm(dim=1)).all()
    assert float(slope[forget].mean()) < -1e-3 * float(J[forget].norm(dim=1).max())


def _restored(params: Sequence[Tensor], start: Sequence[Tensor], forward: Forward) -> Tensor:
    with torch.no_grad():
        for p, p0 in zip(params, start, strict=True):
            p.copy_(p0)
    return forward()["a"]


def test_update_reports_what_it_used() -> None:
    _, forward, params, engine = build()
    losses = forward()
    G = gram_truth(truth_of(losses, params))
    update = engine.backward(losses, mtu.OrthoGrad(), forget=MASK)
    assert update.gram is not None and relative_error(update.gram, G) <= 1e-12
    assert torch.equal(update.weights, mtu.OrthoGrad()(update.gram, update.roles))


# ---- rank ----------------------------------------------------------------------------------------


class Features(nn.Module):
    """Losses x @ w, so that J = x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@pytest.mark.parametrize(
    ("rows", "rank"),
    [
        (torch.eye(4, 7), 4),
        (torch.eye(4, 7)[[0, 1, 1, 2, 0]], 3),
        (torch.cat([torch.eye(3, 7), torch.zeros(2, 7)]), 3),
        (torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), 4),
        (torch.cat([torch.eye(3, 7), 1e-9 * torch.eye(5, 7)[3:]]), 5),
    ],
    ids=["independent", "duplicates", "zero rows", "more rows than parameters", "tiny rows"],
)
def test_rank_of_the_retain_rows(rows: Tensor, rank: int) -> None:
    rows = rows.double()
    model = Features(rows.shape[1])
    engine = mtu.Engine(model)
    g = torch.randn(1, rows.shape[1], dtype=torch.float64)
    forget = torch.arange(len(rows) + 1) == 2
    x = torch.cat([rows[:2], g, rows[2:]])
    update = engine.backward(model(x), mtu.OrthoGrad(alpha=0.0), forget=forget)
    assert update.rank is not None and int(update.rank) == rank
    d = reference.orthograd({"a": rows}, {"a": g}, alpha=0.0)
    assert float((model.w.grad - d).norm()) <= 1e-10 * float(g.norm())
    assert int(engine.rows(model(rows)).rank()) == rank


# ---- memory budget -------------------------------------------------------------------------------


def test_a_budget_changes_only_what_is_kept() -> None:
    model, forward, params, _ = build("mlp_3d_no_bias", tasks=1, n=4)
    wide = nn.Linear(200, 240, bias=False).double()
    x = torch.randn(4, 60, 200, dtype=torch.float64)
    found = {}
    for budget in (0, 4 * 200 * 240 * 8):
        engine = mtu.Engine(wide, memory_budget=budget)
        rows = engine.rows(wide(x).square().sum((1, 2)))
        (line,) = engine.explain().lines
        found[line.kept] = (rows.gram(), rows.vjp(random_weights(4))[wide.weight], line.bytes)
    assert found.keys() == {"rows", "factors"}
    assert relative_error(found["rows"][0], found["factors"][0]) <= 1e-13
    assert relative_error(found["rows"][1], found["factors"][1]) <= 1e-13
    assert found["rows"][2] == 4 * 200 * 240 * 8
    assert found["factors"][2] == 4 * 60 * (200 + 240) * 8


def test_a_budget_is_not_overdrawn() -> None:
    layers = nn.Sequential(
        nn.Linear(200, 200, bias=False), nn.Tanh(), nn.Linear(200, 200, bias=False)
    ).double()
    x = torch.randn(4, 60, 200, dtype=torch.float64)
    # by how much the rows of one layer are more than its factors
    one = 4 * (200 * 200 - 60 * (200 + 200)) * 8
    kept = []
    for budget in (0, one, 2 * one):
        engine = mtu.Engine(layers, memory_budget=budget)
        engine.rows(layers(x).square().sum((1, 2)))
        kept.append(sorted(line.kept for line in engine.explain().lines))
    assert kept == [["factors", "factors"], ["factors", "rows"], ["rows", "rows"]]


def test_a_budget_is_one_for_all_tasks() -> None:
    layer = nn.Linear(200, 200, bias=False).double()
    x = torch.randn(4, 60, 200, dtype=torch.float64)
    # the rows of one task beyond its factors
    one = 4 * 200 * 200 * 8 - (factors := 4 * 60 * (200 + 200) * 8)
    held = []
    for budget in (0, one, 3 * one):
        engine = mtu.Engine(layer, memory_budget=budget)
        h = layer(x)
        engine.rows({task: h.pow(k).sum((1, 2)) for k, task in enumerate("abc", start=2)})
        (line,) = engine.explain().lines
        held.append(line.bytes)
    assert held == [3 * factors, 3 * factors + one, 3 * (factors + one)]


def test_a_budget_is_not_for_rows_that_cost_more_than_they_save() -> None:
    """Few positions: a pass over rows takes longer than a weight gradient."""
    layer = nn.Linear(100, 100, bias=False).double()
    engine = mtu.Engine(layer, memory_budget=1 << 30)
    engine.rows(layer(torch.randn(4, 8, 100, dtype=torch.float64)).square().sum((1, 2)))
    assert [line.kept for line in engine.explain().lines] == ["factors"]


def test_a_budget_is_not_for_rows_that_a_gram_would_not_form() -> None:
    """One position: the products of factors are all there is to do."""
    layer = nn.Linear(30, 30, bias=False).double()
    engine = mtu.Engine(layer, memory_budget=1 << 30)
    engine.rows(layer(torch.randn(4, 30, dtype=torch.float64)).square().sum(1))
    assert [line.kept for line in engine.explain().lines] == ["factors"]


def test_the_smaller_is_kept() -> None:
    """Positions × (in + out) against in × out: rows where there are many positions, factors where there are few."""
    layer = nn.Linear(6, 8).double()
    for positions, expected in ((3, "factors"), (4, "rows")):
        engine = mtu.Engine(layer)
        engine.rows(layer(torch.randn(5, positions, 6, dtype=torch.float64)).sum((1, 2)))
        line = {line.name: line for line in engine.explain().lines}["weight"]
        assert line.kept == expected


# ---- the model is not touched --------------------------------------------------------------------


def state_of(model: nn.Module) -> list[tuple[str, Any]]:
    """All that hangs on a model: attributes, hooks, buffers, gradients, hooks on parameters."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found.append((
                f"{name}.{key}",
                copy.copy(value) if isinstance(value, dict | set | list) else value,
            ))
        found += [
            (f"{name}.{key}", (b.clone(), b._version))
            for key, b in module.named_buffers(recurse=False)
        ]
    for name, p in model.named_parameters():
        keys = sorted(vars(p)) if hasattr(p, "__dict__") else []
        found.append((name, (p.detach().clone(), p._version, p.grad, p._backward_hooks, keys)))
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a is b or a == b)


UNTOUCHED = [
    "mlp",
    "batch_norm_train",
    "batch_norm_eval",
    "dropout",
    "encoder_batch_first",
    "checkpointed_dropout",
]
UNTOUCHED += ["weight_norm", "spectral_norm", "gru", "custom_function"]


@pytest.mark.parametrize("name", UNTOUCHED)
def test_rows_leave_the_model_as_it_is(name: str) -> None:
    model, forward, params, engine = build(name)
    losses = forward()
    before, random = state_of(model), torch.get_rng_state()
    hooks = (
        torch.nn.modules.module._global_forward_hooks,
        torch.nn.modules.module._global_backward_hooks,
    )
    rows = engine.rows(losses, forget=MASK)
    rows.gram()
    rows.vjp(random_weights(len(rows)))
    for (key, old), (now, new) in zip(before, state_of(model), strict=True):
        assert key == now and same(old, new), key
    assert torch.equal(random, torch.get_rng_state())
    assert not any(hooks)


def test_grad_mode_and_the_losses_are_left_alone() -> None:
    _, forward, _, engine = build()
    losses = forward()
    values = {task: loss.detach().clone() for task, loss in losses.items()}
    with torch.no_grad():
        rows = engine.rows(losses)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert not rows.gram().requires_grad
    assert all(torch.equal(losses[task].detach(), values[task]) for task in losses)
    assert not any(g.requires_grad for g in rows.vjp(random_weights(len(rows))).values())


# ---- precision -----------------------------------------------------------------------------------


def test_float32_rows_are_as_good_as_autograd() -> None:
    _, forward, params, engine = build("mlp_float32")
    losses = forward()
    J = truth_of(losses, params)
    rows = engine.rows(losses)
    assert rows.roles.dtype == torch.float32
    assert_rows(rows, J, params, 1e-6)


@pytest.mark.parametrize("cache", [True, False])
def test_bfloat16_autocast(cache: bool) -> None:
    """Rows of the autocast graph are what autograd makes of it, within bfloat16's rounding of its own sums."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(16, 32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Linear(32, 8),
        nn.Conv1d(5, 4, 3, padding=1),
    )
    x = torch.randn(6, 5, 16)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            return net(x).float().square().mean((1, 2))

    params, engine = list(net.parameters()), mtu.Engine(net)
    loss = forward()
    J = truth_of({"a": loss}, params)
    rows = engine.rows(loss)
    assert rows.roles.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert relative_error(rows.gram(), gram_truth(J)) <= 2 * eps
    w = random_weights(6)
    found, truth = rows.vjp(w), combine_truth(J, w)
    for j, p in enumerate(params):
        assert found[p].dtype == torch.float32
        assert relative_error(found[p], truth[j]) <= 4 * eps
    update = rows.backward(mtu.OrthoGrad())
    assert torch.isfinite(update.weights).all()


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.PCGrad(), mtu.GradDiff()])
def test_a_parameter_frozen_after_the_engine_was_made(method: mtu.Method) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    engine = mtu.Engine(net)
    net[0].weight.requires_grad_(False)
    engine.backward(
        net(torch.randn(N, 3, dtype=torch.float64)).square().sum(1),
        method,
        forget=torch.arange(N) == 1,
    )
    assert net[0].weight.grad is None
    assert all(p.grad is not None for p in (net[0].bias, net[2].weight, net[2].bias))


def test_weights_of_the_losses_for_parameters_outside() -> None:
    """Uneven weights inside, a mean outside: what each side gets is what autograd gives under its weights."""
    body, head = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
    net = nn.Sequential(body, nn.Tanh(), head)
    loss = net(torch.randn(N, 3, dtype=torch.float64)).square().flatten(1).sum(1)
    w, mean = torch.randn(N, dtype=torch.float64), torch.full((N,), 1 / N, dtype=torch.float64)
    inside = torch.autograd.grad(loss, list(body.parameters()), w, retain_graph=True)
    outside = torch.autograd.grad(loss, list(head.parameters()), mean, retain_graph=True)
    mtu.Engine(net, body.parameters()).rows(loss).backward(w, outside=mean)
    for p, g in zip(net.parameters(), (*inside, *outside), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)
