"""Empty batches, single samples, tasks without labels: defined results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.errors.bench import Bench, N
from tests.helpers.checks import assert_rows, trained, truth_of

pytestmark = pytest.mark.usefixtures("only_new_objects")


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad(), mtu.Mean()])
def test_an_empty_batch_is_no_step(method: mtu.Method) -> None:
    bench = Bench(n=0)
    with bench.untouched():
        update = bench.engine.backward(
            bench.losses(), method, forget=torch.zeros(0, dtype=torch.bool)
        )
        assert len(update.roles) == 0 and update.weights.shape == (0,)
    rows = bench.engine.rows(bench.losses())
    assert rows.gram().shape == (0, 0) and rows.gram(per="layer").shape == (2, 0, 0)
    assert rows.vjp(torch.zeros(0)) == {}


def test_an_empty_batch_adds_nothing_to_others(bench: Bench) -> None:
    losses = bench.losses()
    J = truth_of(losses, trained(bench.model.backbone))
    nothing = bench.engine.rows(bench.model(bench.x[:0]), forget=True)
    rows = mtu.cat(nothing, bench.engine.rows(losses), nothing)
    assert_rows(rows, J, trained(bench.model.backbone), 1e-12)
    update = rows.backward(mtu.OrthoGrad(alpha=0.3))
    assert (update.weights == 0.3 / N).all()


@pytest.mark.parametrize("forget", [True, False])
@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.3), mtu.GradDiff(0.3), mtu.PCGrad()])
def test_one_sample(forget: bool, method: mtu.Method) -> None:
    bench = Bench(n=1)
    losses = bench.losses()
    params = trained(bench.model.backbone)
    J = truth_of(losses, params)
    assert_rows(bench.engine.rows(losses), J, params, 1e-12)
    update = bench.engine.backward(bench.losses(), method, forget=forget)
    assert len(update.weights) == 2 and torch.isfinite(update.weights).all()


@pytest.mark.parametrize("view", [lambda w: w.t(), lambda w: w[:, :], lambda w: w.view(9)])
def test_a_task_without_labels_where_a_weight_is_used_twice(
    view: Callable[[Tensor], Tensor],
) -> None:
    layer = nn.Linear(3, 3, bias=False).double()
    x = torch.randn(N, 3, dtype=torch.float64)
    h = layer(x)
    losses = {"a": h.square().sum(1), "b": ((h @ view(layer.weight).view(3, 3)) ** 2).sum(1)}
    truth = truth_of({"a": losses["a"]}, layer.parameters())
    rows = mtu.Engine(layer).rows(losses, present={"b": torch.zeros(N, dtype=torch.bool)})
    assert_rows(rows, truth, trained(layer), 1e-12)
