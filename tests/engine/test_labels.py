"""Samples without a label, and tasks without any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from tests.engine.small import MASK, N, build
from tests.helpers.checks import (
    assert_rows,
    clear,
    grad_vector,
    truth_of,
)
from tests.helpers.truth import relative_error


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
