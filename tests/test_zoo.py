"""The engine against one backward per row, on every model of the zoo: by rules, and by the generic path alone."""

from __future__ import annotations

import pytest
import torch

import mtu_fast as mtu
from mtu_fast import reference
from mtu_fast._graph.rules import RULES
from tests.helpers.checks import (
    assert_rows,
    clear,
    combine_error,
    grad_vector,
    joined,
    random_weights,
    trained,
    truth_of,
    twin,
    vector,
)
from tests.helpers.truth import combine_truth, gram_truth, relative_error
from tests.helpers.zoo import CASES, Case

N = 4
MASK = torch.tensor([True, False, False, True])
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
one_and_three = pytest.mark.parametrize("tasks", [1, 3])


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # A case has a compiled region, whose rows are exact and slow.
    pytest.mark.filterwarnings("ignore:losses. found a module run by torch.compile:UserWarning"),
]


# the generic path is the same whatever the number of tasks
by_path = pytest.mark.parametrize(
    ("tasks", "path"), [(1, "rules"), (3, "rules"), (3, "generic")], indirect=["path"]
)


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the rules, and with no rule at all: the generic path alone."""
    if request.param == "generic":
        for name in list(RULES):
            monkeypatch.delitem(RULES, name)
    return str(request.param)


@every_case
@by_path
def test_gram_and_combine_are_those_of_autograd(case: Case, tasks: int, path: str) -> None:
    """On the first call, which discovers the graph, and on a later one, which finds its plan again."""
    model, forward = case.build(tasks, N)
    params, engine = trained(model), mtu.Engine(model)
    for call in range(2):
        losses = forward()
        J = truth_of(losses, params)
        assert_rows(engine.rows(losses), J, params, case.tolerance, seed=call)
    slow = {line.slow for line in engine.explain().lines if line.kept != "-"}
    assert (False in slow) == (path == "rules" and case.name not in ALL_SLOW)


# every sample's loss reads all features: rows mix in all that lies below
ALL_SLOW = {"contrastive"}


@every_case
@pytest.mark.parametrize("request_", ["full", "partial"])
def test_orthograd_is_that_of_the_reference(case: Case, request_: str) -> None:
    model, forward = case.build(3, N)
    params, engine = trained(model), mtu.Engine(model)
    losses = forward()
    forget = MASK if request_ == "full" else {"b": MASK, "c": ~MASK}
    reference.backward(params, losses, forget=forget, alpha=0.3, tol=1e-7 if case.float64 else 1e-6)
    expected = grad_vector(params)
    clear(params)

    rows = engine.rows(losses, forget=forget)
    nothing = torch.zeros(N, dtype=torch.bool)
    masks = [MASK] * 3 if request_ == "full" else [nothing, MASK, ~MASK]
    assert torch.equal(rows.roles.kind, torch.cat(masks).long())
    assert torch.equal(rows.roles.task, torch.arange(3).repeat_interleave(N))
    assert torch.equal(rows.roles.sample, torch.arange(N).repeat(3))
    assert torch.equal(rows.roles.loss, torch.cat(list(losses.values())).detach().double())
    assert rows.roles.tasks == ("a", "b", "c")

    rows.backward(mtu.OrthoGrad(alpha=0.3))
    assert relative_error(grad_vector(params), expected) <= case.tolerance


@every_case
def test_heads_outside_get_the_plain_weighted_losses(case: Case) -> None:
    model, forward = case.build(3, N)
    backbone, heads = trained(model.backbone), trained(model.heads)
    engine = mtu.Engine(model, params=model.backbone.parameters())
    losses = forward()
    J = truth_of(losses, backbone)
    weighted = [0.3 * loss[~MASK].mean() - 0.7 * loss[MASK].mean() for loss in losses.values()]
    expected = torch.autograd.grad(sum(weighted), heads, retain_graph=True) if heads else ()
    rows = engine.rows(losses, forget=MASK)
    assert_rows(rows, J, backbone, case.tolerance)
    update = rows.backward(mtu.OrthoGrad(alpha=0.3))
    d = vector(combine_truth(J, update.weights).values(), backbone)
    assert relative_error(grad_vector(backbone), d) <= case.tolerance
    if heads:
        assert relative_error(grad_vector(heads), vector(expected, heads)) <= case.tolerance


@every_case
@one_and_three
def test_layers_and_tensors_add_up(case: Case, tasks: int) -> None:
    model, forward = case.build(tasks, N)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = trained(model)
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    losses = forward()
    J = truth_of(losses, params)
    rows = mtu.Engine(model).rows(losses)
    scale = float(gram_truth(J).norm())

    tensors = rows.gram(per="tensor")
    for g, stack in zip(tensors, J.values(), strict=True):
        assert float((g - gram_truth({0: stack})).norm()) <= case.tolerance * scale
    by_layer = rows.gram(per="layer")
    assert len(by_layer) == len(layers)
    for g, layer in zip(by_layer, layers, strict=True):
        mine = {j: J[j] for j, name in enumerate(names) if name.rpartition(".")[0] == layer}
        assert float((g - gram_truth(mine)).norm()) <= case.tolerance * scale
    assert relative_error(tensors.sum(0), rows.gram()) <= 1e-13
    assert relative_error(by_layer.sum(0), rows.gram()) <= 1e-13

    w = random_weights(len(layers) * len(rows)).view(len(layers), -1)
    truth = {
        j: combine_truth({j: J[j]}, w[layers.index(name.rpartition(".")[0])])[j]
        for j, name in enumerate(names)
    }
    if len(layers) > 1:
        assert combine_error(rows.vjp(w), truth, params) <= case.tolerance


@every_case
@by_path
def test_rows_of_two_forwards(case: Case, tasks: int, path: str) -> None:
    """Both made before the first call, of unequal size; cross terms, either order."""
    model, forward = case.build(tasks, N)
    params, engine = trained(model), mtu.Engine(model)
    first, second = forward(), twin(case, model, tasks, N - 1)()
    J, K = truth_of(first, params), truth_of(second, params)
    b = engine.rows(second)
    a = engine.rows(first)
    assert len(a) == tasks * N and len(b) == tasks * (N - 1)
    for rows, truth in ((mtu.cat(a, b), joined(J, K)), (mtu.cat(b, a), joined(K, J))):
        assert_rows(rows, truth, params, case.tolerance)
    assert torch.equal(mtu.cat(a, b).roles.sample, torch.cat([a.roles.sample, b.roles.sample]))
