"""Methods whose step is an ordinary backward, or a loop from their paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast import reference
from tests.engine.small import MASK, N, backward_of, build
from tests.helpers.checks import (
    assert_rows,
    clear,
    grad_vector,
    random_weights,
    trained,
    truth_of,
    vector,
)
from tests.helpers.truth import combine_truth, relative_error


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
