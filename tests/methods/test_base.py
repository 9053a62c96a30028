"""Roles, means per (kind, task), argument checks, and what all methods have in common."""

from __future__ import annotations

import pytest
import torch

from mtu_fast.methods import (
    FORGET,
    MGDA,
    RETAIN,
    SUBSPACE,
    CAGrad,
    DualProj,
    FineTune,
    GradDiff,
    GradientAscent,
    Mean,
    Method,
    OrthoGrad,
    PCGrad,
    RandomLabels,
    Roles,
    UPGrad,
    dependence_tolerance,
    mean_weights,
)
from tests.helpers.matrices import conditioned, roles, roles_of

METHODS: list[Method] = [Mean(), GradDiff(0.3), OrthoGrad(0.3), PCGrad()]
METHODS += [FineTune(), GradientAscent(), RandomLabels(0.3)]
CONVEX: list[Method] = [MGDA(), CAGrad(0.3), DualProj(), UPGrad()]
METHODS += CONVEX
# kinds and tasks of six rows: two tasks of unequal counts, and a kept row
KINDS, TASKS = [RETAIN, RETAIN, FORGET, RETAIN, FORGET, SUBSPACE], [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (RETAIN, [0.5, 0.5, 0, 1, 0, 0]),
        (FORGET, [0, 0, 1, 0, 1, 0]),
        (SUBSPACE, [0, 0, 0, 0, 0, 1]),
        (None, [1 / 3, 1 / 3, 1 / 3, 0.5, 0.5, 0]),
    ],
)
def test_mean_weights_are_one_over_the_count_in_the_task(
    kind: int | None, expected: list[float]
) -> None:
    w = mean_weights(roles(KINDS, TASKS), kind)
    assert w.dtype == torch.float64
    assert torch.equal(w, torch.tensor(expected, dtype=torch.float64))


def test_mean_weights_of_no_rows() -> None:
    assert mean_weights(roles([]), None).shape == (0,)


def test_mean_weights_refuses_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind: found 7"):
        mean_weights(roles([RETAIN]), 7)


def test_roles_refuse_unequal_lengths() -> None:
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'kind': \(1,\).*one length"):
        Roles(two, two, one, two.double(), ("a",))


def test_roles_refuse_a_mask_as_kind() -> None:
    index = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"kind is torch.bool.*long"):
        Roles(index, index, index.bool(), index.double(), ("a",))


def test_tolerance_of_an_unknown_dtype_is_refused() -> None:
    assert dependence_tolerance(torch.float32) == 1e-6
    with pytest.raises(TypeError, match=r"int32, expected one of"):
        dependence_tolerance(torch.int32)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_follows_the_protocol(method: Method) -> None:
    assert isinstance(method, Method)
    G = conditioned(6, 9, 10.0)
    w = method(G @ G.t(), roles(KINDS, TASKS))
    assert w.shape == (6,) and w.dtype == torch.float64 and torch.isfinite(w).all()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_kept_rows_have_no_share_in_means(method: Method) -> None:
    J = conditioned(6, 9, 10.0)
    assert method(J @ J.t(), roles(KINDS, TASKS))[5] == 0
    assert method.outside(roles(KINDS, TASKS))[5] == 0


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_outside_is_equal_within_a_kind_and_task(method: Method) -> None:
    w = method.outside(roles([RETAIN, FORGET, RETAIN, FORGET, RETAIN, FORGET], [0, 0, 0, 1, 1, 1]))
    assert w.dtype == torch.float64
    assert w[0] == w[2] and w[3] == w[5]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_never_waits_for_the_device(method: Method) -> None:
    """On tensors without data, any look at a value would raise."""
    r = roles_of(3, 2)
    task, sample, kind, loss = (column.to("meta") for column in (r.task, r.sample, r.kind, r.loss))
    G = torch.empty(4, 5, 5, dtype=torch.float64, device="meta")
    w = method(G, Roles(task, sample, kind, loss, r.tasks, r.dtype))
    assert w.device.type == "meta" and w.shape[-1] == 5


@pytest.mark.parametrize("method", [OrthoGrad(), PCGrad(), *CONVEX], ids=repr)
def test_refuses_a_gram_of_other_rows(method: Method) -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 4\), expected \[\.\.\., 5, 5\] for 5 rows"):
        method(torch.eye(4, dtype=torch.float64), roles_of(3, 2))


@pytest.mark.parametrize("method", [OrthoGrad(), PCGrad(), *CONVEX], ids=repr)
def test_refuses_a_gram_of_integers(method: Method) -> None:
    with pytest.raises(TypeError, match=r"G is torch.int64.*rows.gram\(\)"):
        method(torch.eye(5, dtype=torch.int64), roles_of(3, 2))


@pytest.mark.parametrize("make", [OrthoGrad, GradDiff])
@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), float("inf")])
def test_refuses_alpha_outside_the_unit_interval(make: type, alpha: float) -> None:
    with pytest.raises(
        ValueError, match=r"alpha: found .*expected a number in \[0, 1\].*learning rate"
    ):
        make(alpha=alpha)


@pytest.mark.parametrize("make", [OrthoGrad, GradDiff])
@pytest.mark.parametrize("alpha", ["0.5", None, True])
def test_refuses_an_alpha_that_is_no_number(make: type, alpha: object) -> None:
    with pytest.raises(TypeError, match=r"expected a (finite )?number"):
        make(alpha=alpha)


def test_refuses_an_unknown_granularity() -> None:
    with pytest.raises(
        ValueError, match="granularity: found 'layers', expected one of 'global', 'layer', 'tensor'"
    ):
        OrthoGrad(granularity="layers")


def test_refuses_a_seed_for_a_generator() -> None:
    with pytest.raises(TypeError, match=r"generator: found int.*manual_seed"):
        PCGrad(generator=3)


@pytest.mark.parametrize("c", [-0.1, float("nan"), float("inf")])
def test_cagrad_refuses_a_ball_of_no_radius(c: float) -> None:
    with pytest.raises(ValueError, match=r"c: found .*at least 0"):
        CAGrad(c=c)


@pytest.mark.parametrize("c", ["0.5", None, True])
def test_cagrad_refuses_a_c_that_is_no_number(c: object) -> None:
    with pytest.raises(TypeError, match=r"expected a (finite )?number"):
        CAGrad(c=c)
