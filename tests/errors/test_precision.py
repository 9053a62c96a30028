"""Unequal, half and single precision: right, or an error where it overflows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from tests.errors.bench import MASK, Bench, N
from tests.helpers.checks import assert_rows, grads, same_grads, trained, truth_of

pytestmark = pytest.mark.usefixtures("only_new_objects")


def test_tasks_in_unequal_precision(bench: Bench) -> None:
    """A float32 loss beside a float64 one: exact to float32, and rows say so."""
    losses = bench.losses()
    mixed = {"a": losses["a"], "b": losses["b"].float()}
    params = trained(bench.model.backbone)
    J = truth_of(mixed, params)
    rows = bench.engine.rows(mixed)
    assert rows.roles.dtype == torch.float32
    assert_rows(rows, J, params, 1e-6)
    rows.backward(mtu.OrthoGrad())


def test_parameters_in_unequal_precision() -> None:
    model = nn.Sequential(nn.Linear(3, 6).double(), nn.Tanh(), nn.Linear(6, 4))
    engine, params = mtu.Engine(model), trained(model)
    x = torch.randn(N, 3, dtype=torch.float64)
    loss = model[2](model[1](model[0](x)).float()).square().sum(1)
    J = truth_of({"a": loss}, params)
    rows = engine.rows(loss, forget=MASK)
    assert_rows(rows, J, params, 1e-6)
    rows.backward(mtu.OrthoGrad())
    assert [p.grad.dtype for p in params] == [p.dtype for p in params]


def test_cat_of_unequal_precision(bench: Bench) -> None:
    """One forward in float64, one under autocast: both kinds of rows meet in float64 Grams."""
    losses = bench.losses()
    model = bench.model
    with torch.autocast("cpu", torch.bfloat16):
        low = {task: loss.double() for task, loss in model(bench.x).items()}
    params = trained(model.backbone)
    J, K = truth_of(losses, params), truth_of(low, params)
    rows = mtu.cat(bench.engine.rows(losses), bench.engine.rows(low))
    assert rows.roles.dtype in (torch.float64, torch.bfloat16)
    assert_rows(
        rows, {j: torch.cat([J[j], K[j]]) for j in J}, params, 4 * torch.finfo(torch.bfloat16).eps
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)
    engine, params = mtu.Engine(model), trained(model)
    loss = model(torch.randn(N, 3).to(dtype)).square().sum(1)
    J = truth_of({"a": loss}, params)
    rows = engine.rows(loss, forget=MASK)
    assert rows.roles.dtype == dtype
    assert_rows(rows, J, params, 8 * torch.finfo(dtype).eps)
    update = rows.backward(mtu.OrthoGrad())
    assert torch.isfinite(update.weights).all()
    assert all(p.grad.dtype == dtype for p in params)


@pytest.mark.filterwarnings("ignore:backward. .grad still holds:UserWarning")  # on purpose
@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()])
def test_overflow_in_half_precision_is_an_error(earlier: int, method: mtu.Method) -> None:
    """Losses of 0 whose gradients are 500 · 500, beyond float16."""
    model = nn.Linear(3, 4, bias=False).half()
    torch.nn.init.zeros_(model.weight)
    engine, sizes = mtu.Engine(model), [3.0] * earlier + [500.0]
    for size in sizes:
        before = grads(model.parameters())
        loss = (model(torch.full((N, 3), size, dtype=torch.float16)) * size).sum(1)
        if size == 3.0:
            engine.backward(loss, method)
            continue
        with pytest.raises(RuntimeError, match="not finite"):
            engine.backward(loss, method)
        assert same_grads(before, list(model.parameters()))


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()])
def test_overflow_in_single_precision_is_an_error(method: mtu.Method) -> None:
    """Rows of 1e40, whose Gram in float64 is finite."""
    model = nn.Linear(3, 4, bias=False)
    torch.nn.init.constant_(model.weight, 1e-3)
    loss = model(torch.full((N, 3), 1e4))[:, 0] * 1e36
    with pytest.raises(RuntimeError, match="not finite"):
        mtu.Engine(model).backward(loss, method, forget=MASK)
    assert model.weight.grad is None


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(1.0), mtu.GradDiff(1.0), mtu.PCGrad(), mtu.Mean()]
)
def test_a_sum_over_tasks_beyond_half_precision(method: mtu.Method) -> None:
    """Three gradients of 30000 each are finite in float16; their sum is not."""
    model = nn.ParameterList([torch.ones(3, dtype=torch.float16)])
    model[0].grad = torch.full((3,), 7.0, dtype=torch.float16)
    params = trained(model)
    before, x = grads(params), torch.full((1, 3), 3e4, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"not finite; \.grad is untouched"):
        mtu.Engine(model).backward(dict.fromkeys("abc", (x * model[0])[:, 0]), method)
    assert same_grads(before, params)


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(1.0), mtu.GradDiff(1.0), mtu.PCGrad(), mtu.Mean()]
)
def test_no_false_alarm_in_half_precision(method: mtu.Method) -> None:
    """80000 gradients of one: finite each, though their float16 sum is not."""
    model = nn.Linear(200, 400).half()
    loss = model(torch.ones(2, 200).half()).float().sum(1)
    mtu.Engine(model).backward(loss, method)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
