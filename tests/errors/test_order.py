"""Calls in an order that has no answer: a graph used twice, parameters or activations changed meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from tests.errors.bench import MASK, Bench, Losses, N, refused
from tests.helpers.checks import assert_rows, trained, truth_of

pytestmark = pytest.mark.usefixtures("only_new_objects")


def test_backward_twice(bench: Bench) -> None:
    rows = bench.engine.rows(bench.losses(), forget=MASK)
    rows.backward(mtu.OrthoGrad())
    with bench.untouched():
        for call in (lambda: rows.backward(mtu.OrthoGrad()), rows.gram, lambda: rows.vjp(torch.ones(2 * N)),
                     lambda: mtu.cat(rows)):  # fmt: skip
            with pytest.raises(
                RuntimeError, match=r"backward was called before.*call engine\.rows again"
            ):
                call()


def test_backward_twice_through_cat(bench: Bench) -> None:
    one, two = bench.engine.rows(bench.losses()), bench.engine.rows(bench.losses(), forget=True)
    mtu.cat(one, two).backward(mtu.OrthoGrad())
    with bench.untouched(), pytest.raises(RuntimeError, match="backward was called before"):
        one.backward(mtu.OrthoGrad())


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()])
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_graph_twice(bench: Bench, method: mtu.Method, earlier: int) -> None:
    """The same answer on the first call of an engine, which keeps the graph for discovery, as on later ones."""
    for _call in range(earlier):
        bench.engine.rows(bench.losses())

    def call(losses: Losses) -> None:
        bench.engine.rows(losses)
        bench.engine.backward(losses, method)

    refused(
        bench, RuntimeError, r"used up by an earlier rows or backward; run the forward again", call
    )


def test_after_an_ordinary_backward(bench: Bench) -> None:
    losses = bench.losses()
    torch.autograd.grad(sum(loss.sum() for loss in losses.values()), trained(bench.model))
    with bench.untouched():
        with pytest.raises(RuntimeError, match="used up by an earlier rows or backward") as caught:
            bench.engine.rows(losses)
        caught.value.__traceback__ = None
        del losses, caught


@pytest.mark.parametrize("earlier", [0, 1])
def test_parameters_changed_after_the_forward(bench: Bench, earlier: int) -> None:
    for _call in range(earlier):
        bench.engine.rows(bench.losses())

    def call(losses: Losses) -> None:
        with torch.no_grad():
            bench.model.backbone[2].weight.mul_(1.5)
        bench.engine.backward(losses, mtu.OrthoGrad(), forget=MASK)

    refused(
        bench, RuntimeError, r"changed in place after the forward.*before anything is changed", call
    )


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_activation_changed_after_the_forward(bench: Bench, earlier: int) -> None:
    layer = nn.Linear(3, 4).double()
    engine = mtu.Engine(layer)
    for _call in range(earlier):
        engine.rows(torch.sigmoid(layer(bench.x)).sum(1))
    h = torch.sigmoid(layer(bench.x))
    loss = h.sum(1)
    h.detach().mul_(2)
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        engine.rows(loss)


def step(bench: Bench) -> None:
    torch.optim.SGD(bench.model.parameters(), lr=1e-3).step()


def test_parameters_changed_between_rows_and_backward(bench: Bench) -> None:
    rows = bench.engine.rows(bench.losses())
    step(bench)
    with bench.untouched():
        for call in (
            lambda: rows.backward(mtu.OrthoGrad()),
            lambda: rows.backward(torch.ones(2 * N)),
            rows.gram,
        ):
            with pytest.raises(
                RuntimeError, match=r"parameters changed in place since these rows.*step only after"
            ):
                call()
        rows._parts.clear()


def test_parameters_changed_between_two_rows_of_one_cat(bench: Bench) -> None:
    early = bench.engine.rows(bench.losses())
    step(bench)
    late = bench.engine.rows(bench.losses(), forget=True)
    with pytest.raises(RuntimeError, match="parameters changed in place since these rows"):
        mtu.cat(early, late)


def test_parameters_changed_between_two_forwards(bench: Bench) -> None:
    """Both forwards, then a step in between, then rows of both: the older graph is out of date."""
    early = bench.losses()
    step(bench)
    bench.engine.rows(bench.losses())
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        bench.engine.rows(early)


@pytest.mark.parametrize("name", ["bias", "weight"])
def test_a_parameter_that_no_gradient_depends_on_changed_after_the_forward(name: str) -> None:
    """The first layer is in no saved tensor, so autograd does not see it move: rows are of the forward's point."""
    layer = nn.Linear(3, 4).double()
    engine, x = mtu.Engine(layer), torch.randn(N, 3, dtype=torch.float64)
    loss = layer(x).square().sum(1)
    J = truth_of({"a": loss}, trained(layer))
    with torch.no_grad():
        layer.get_parameter(name).add_(1)
    assert_rows(engine.rows(loss), J, trained(layer), 1e-12)
