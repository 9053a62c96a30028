"""Interference-aware unlearning in Gram space against SVD and QR on the rows themselves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, SUBSPACE, InterferenceAware, OrthoGrad, Roles
from mtu_fast.methods.interference import CHECK_EVERY, ORDERS, basis_weights
from tests.helpers import matrices
from tests.helpers.matrices import roles
from tests.helpers.truth import relative_error

P = 300
K, RETAINED, FORGOTTEN = 40, 14, 5  # of two tasks, the first of which is the target


def partial_task(
    dtype: torch.dtype = torch.float64, kept: int = K, seed: int = 0
) -> tuple[Tensor, Roles]:
    """Retain rows of two tasks, forget and kept rows of the first; kept and forget rows have much in common."""
    J = matrices.conditioned(RETAINED + FORGOTTEN + kept, P, 30.0, seed)
    J[RETAINED : RETAINED + FORGOTTEN] += J[-FORGOTTEN:] + J[:FORGOTTEN]
    kinds = [RETAIN] * RETAINED + [FORGET] * FORGOTTEN + [SUBSPACE] * kept
    tasks = [0] * 7 + [1] * (RETAINED - 7) + [0] * (FORGOTTEN + kept)
    return J.to(dtype), roles(kinds, tasks, dtype)


def truth(J: Tensor, alpha: float, order: str, **options: Any) -> Tensor:
    J = J.double()
    retain = {"a": J[:7], "b": J[7:RETAINED]}
    forget = {"a": J[RETAINED : RETAINED + FORGOTTEN]}
    return reference.interference_aware(
        retain, forget, J[RETAINED + FORGOTTEN :], alpha, order, **options
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"energy": 0.9},
    {"rank": 20},
    {"energy": 0.99, "rank": 30},
    {"retain": "target"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_the_reference(order: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    J, who = partial_task(dtype)
    d = J.double().t() @ InterferenceAware(0.3, order=order, **options)(
        J.double() @ J.double().t(), who
    )
    others = {name: value for name, value in options.items() if name != "retain"}
    targets = ("a",) if "retain" in options else None
    assert relative_error(d, truth(J, 0.3, order, targets=targets, **others)) <= 1e-11


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_ridge_is_the_reference(ridge: float) -> None:
    J, who = partial_task()
    d = J.t() @ InterferenceAware(0.0, ridge=ridge)(J @ J.t(), who)
    assert relative_error(d, truth(J, 0.0, "joint", ridge=ridge)) <= 1e-11


def test_a_ridge_leads_from_the_exact_constraint_to_none() -> None:
    J, who = partial_task()
    G = J @ J.t()
    exact, free = InterferenceAware(0.0)(G, who), InterferenceAware(0.0, ridge=1e9)(G, who)
    assert (
        relative_error(J.t() @ InterferenceAware(0.0, ridge=1e-12)(G, who), J.t() @ exact) <= 1e-6
    )
    U = reference.interference.basis(J[RETAINED + FORGOTTEN :], 1.0, None, 1e-3)
    f = J[RETAINED : RETAINED + FORGOTTEN].mean(0)
    assert relative_error(J.t() @ free, -U.t() @ (U @ f)) <= 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_joint_is_inside_the_span_and_across_every_retain_row(seed: int) -> None:
    """In float32, combined in float32, and not by being zero."""
    J, who = partial_task(torch.float32, seed=seed)
    w = InterferenceAware(0.0)(J.double() @ J.double().t(), who)
    d = (w.float() @ J).double()
    held, kept = J[:RETAINED].double(), J[RETAINED + FORGOTTEN :].double()
    g_f = J[RETAINED : RETAINED + FORGOTTEN].double().mean(0)
    Q = torch.linalg.qr(kept.t()).Q
    assert (d - Q @ (Q.t() @ d)).norm() <= 1e-6 * d.norm()
    assert ((held @ d).abs() <= 1e-6 * held.norm(dim=1) * d.norm()).all()
    assert d.norm() >= 0.05 * g_f.norm()
    assert -(g_f @ d) > 0  # it ascends


def test_the_two_sequences_hold_one_constraint_each() -> None:
    J, who = partial_task()
    G, kept = J @ J.t(), J[RETAINED + FORGOTTEN :]
    Q = torch.linalg.qr(kept.t()).Q
    outside, across = {}, {}
    for order in ORDERS:
        d = J.t() @ InterferenceAware(0.0, order=order)(G, who)
        outside[order] = float((d - Q @ (Q.t() @ d)).norm() / d.norm())
        across[order] = float((J[:RETAINED] @ d).norm() / d.norm())
    assert outside["joint"] <= 1e-12 and across["joint"] <= 1e-12
    assert outside["project-first"] >= 1e-2 and across["project-first"] <= 1e-12
    assert outside["orthogonalize-first"] <= 1e-12 and across["orthogonalize-first"] >= 1e-2


def test_without_a_subspace_it_is_orthograd() -> None:
    J, who = partial_task(kept=0)
    G = J @ J.t()
    for order in ORDERS:
        assert (
            relative_error(InterferenceAware(0.4, order=order)(G, who), OrthoGrad(0.4)(G, who))
            <= 1e-12
        )
    found = InterferenceAware(0.4).measure(G, who)
    assert (int(found.dimension), int(found.rank)) == (0, RETAINED)


def test_forget_rows_get_no_weight_of_their_own() -> None:
    J, who = partial_task()
    w = InterferenceAware(0.3)(J @ J.t(), who)
    assert torch.equal(w[who.kind == FORGET], torch.zeros(FORGOTTEN, dtype=torch.float64))
    assert torch.allclose(
        w[who.kind == RETAIN], torch.tensor([0.3 / 7] * RETAINED, dtype=torch.float64), rtol=1e-15
    )


def test_a_subspace_of_the_step_itself_leaves_nothing_in_the_partial_case_and_says_so() -> None:
    """K can then never exceed the number of constraints."""
    J, who = partial_task(kept=10)
    J[RETAINED + FORGOTTEN :] = J[:10]
    with pytest.warns(
        UserWarning, match=r"K = 10 .* rank 10 .*‖d‖/‖g_f‖ = .*size=K.*at least 20.*'target'.*ridge"
    ):
        w = InterferenceAware(0.0)(J @ J.t(), who)
    assert (J.t() @ w).norm() <= 1e-6


def test_warns_again_only_every_so_many_calls() -> None:
    J, who = partial_task(kept=10)
    G, method = J @ J.t(), InterferenceAware(0.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(CHECK_EVERY + 1):
            method(G, who)
    assert len(seen) == 2


@pytest.mark.parametrize("way_out", [{"retain": "target"}, {"ridge": 0.1}], ids=str)
def test_the_ways_out_leave_something(way_out: dict[str, Any]) -> None:
    """As many kept rows as constraints: nothing is left, unless the other task is given up, or a little of all."""
    J, who = partial_task(kept=RETAINED)
    found = InterferenceAware(0.0, **way_out).measure(J @ J.t(), who)
    assert float(InterferenceAware(0.0).measure(J @ J.t(), who).share) <= 1e-9
    assert float(found.share) >= 0.05


def test_without_forget_rows_it_descends_on_retain() -> None:
    J = matrices.conditioned(10, 60, 10.0)
    who = roles([RETAIN] * 4 + [SUBSPACE] * 6)
    w = InterferenceAware(0.6)(J @ J.t(), who)
    assert torch.allclose(w, torch.tensor([0.15] * 4 + [0.0] * 6, dtype=torch.float64), atol=1e-15)


def test_without_retain_rows_it_projects() -> None:
    J = matrices.conditioned(10, 60, 10.0)
    who = roles([FORGET] * 4 + [SUBSPACE] * 6)
    Q = torch.linalg.qr(J[4:].t()).Q
    expected = -(Q @ (Q.t() @ J[:4].mean(0)))
    for order in ORDERS:
        d = J.t() @ InterferenceAware(0.0, order=order)(J @ J.t(), who)
        assert relative_error(d, expected) <= 1e-11


@pytest.mark.parametrize("options", [{}, {"energy": 0.9}], ids=str)
def test_a_batch_is_its_matrices_one_by_one(options: dict[str, Any]) -> None:
    who = partial_task()[1]
    G = torch.stack([J @ J.t() for J in (partial_task(seed=seed)[0] for seed in range(3))])
    method = InterferenceAware(0.2, **options)
    one_by_one = torch.stack([method(g, who) for g in G])
    assert relative_error(method(G, who), one_by_one) <= 1e-9


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_weights_do_not_depend_on_the_scale_of_the_loss(factor: float) -> None:
    J, who = partial_task()
    for method in (
        InterferenceAware(0.2),
        InterferenceAware(0.2, ridge=0.1),
        InterferenceAware(0.2, energy=0.9),
    ):
        assert relative_error(method(factor**2 * J @ J.t(), who), method(J @ J.t(), who)) <= 1e-9


def test_duplicate_and_zero_rows_change_nothing() -> None:
    J, who = partial_task()
    d = J.t() @ InterferenceAware(0.0)(J @ J.t(), who)
    extra = torch.cat([J, J[:2], J[-2:], torch.zeros(2, P, dtype=J.dtype)])
    kinds = [*who.kind.tolist(), RETAIN, RETAIN, SUBSPACE, SUBSPACE, RETAIN, SUBSPACE]
    again = extra.t() @ InterferenceAware(0.0)(
        extra @ extra.t(), roles(kinds, [*who.task.tolist(), 0, 0, 0, 0, 1, 0])
    )
    assert relative_error(again, d) <= 1e-10


def test_basis_weights_of_a_diagonal() -> None:
    G = torch.diag(torch.tensor([4.0, 0.0, 1.0, 1e-8], dtype=torch.float64))
    W, K = basis_weights(G, 1e-7)
    assert (
        torch.equal(W.abs().sum(1), torch.tensor([0.5, 0.0, 1.0, 1e4], dtype=torch.float64))
        and int(K) == 3
    )
    W, K = basis_weights(G, 1e-7, energy=0.7)
    assert (
        torch.equal(W.abs().sum(1), torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64))
        and int(K) == 1
    )
    W, K = basis_weights(G, 1e-7, energy=0.85)
    assert int(K) == 2
    W, K = basis_weights(G, 1e-7, rank=2)
    assert int(K) == 2


@pytest.mark.parametrize("retain", ["all", "target"])
@pytest.mark.parametrize("order", ["joint", "project-first"])
def test_a_correction_removes_what_the_constraints_feel(order: str, retain: str) -> None:
    """Of d and something more in the span; that of order "joint" stays there."""
    J, who = partial_task()
    G, method = J @ J.t(), InterferenceAware(0.3, order=order, retain=retain)
    constraint = method.constraint(G, who, method(G, who))
    assert constraint is not None
    held, kept = J[: RETAINED if retain == "all" else 7], J[RETAINED + FORGOTTEN :]
    assert constraint.active.nonzero().flatten().tolist() == list(range(len(held)))
    d = J.t() @ constraint.part
    assert (held @ d).norm() <= 1e-11 * d.norm()
    d = d + kept.t() @ matrices.random_vector(K)
    assert (held @ d).norm() >= 1e-3 * d.norm()
    c = J.t() @ constraint.correction(J @ d)
    assert (held @ (d - c)).norm() <= 1e-11 * d.norm()
    Q = torch.linalg.qr(kept.t()).Q
    assert ((c - Q @ (Q.t() @ c)).norm() <= 1e-11 * c.norm()) == (order == "joint")


def test_a_residue_by_definition_is_no_constraint() -> None:
    J, who = partial_task()
    for method in (InterferenceAware(order="orthogonalize-first"), InterferenceAware(ridge=0.1)):
        assert method.constraint(J @ J.t(), who, method(J @ J.t(), who)) is None
    J, who = partial_task(kept=0)
    assert (
        InterferenceAware(ridge=0.1).constraint(J @ J.t(), who, InterferenceAware()(J @ J.t(), who))
        is not None
    )


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"alpha": 2.0}, ValueError, "alpha: found 2.0"),
        ({"order": "both"}, ValueError, "order: found 'both', expected one of 'joint'"),
        ({"retain": "none"}, ValueError, "retain: found 'none'"),
        ({"energy": 0.0}, ValueError, "energy: found 0.0"),
        ({"energy": "all"}, TypeError, "energy: found 'all'"),
        ({"rank": 0}, ValueError, "rank: found 0"),
        ({"rank": 2.5}, TypeError, "rank: found 2.5"),
        ({"ridge": -1.0}, ValueError, "ridge: found -1.0"),
        ({"ridge": float("nan")}, ValueError, "ridge: found nan"),
        ({"ridge": "soft"}, TypeError, "ridge: found 'soft'"),
        ({"ridge": 0.1, "order": "project-first"}, ValueError, "softens order='joint' only"),
        ({"granularity": "channel"}, ValueError, "granularity: found 'channel'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        InterferenceAware(**options)
