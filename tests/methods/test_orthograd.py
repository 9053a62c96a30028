"""OrthoGrad in Gram space against QR on the rows themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, OrthoGrad, Roles, dependence_tolerance
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of
from tests.helpers.truth import relative_error

CONDITIONS = [6e0, 6e1, 6e2, 6e3, 6e4]
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


def direction(J: Tensor, who: Roles, alpha: float) -> tuple[Tensor, int]:
    """d = Jᵀ w in float64 and the rank, from the float64 Gram matrix of the rows as they are."""
    J = J.double()
    w, rank = OrthoGrad(alpha).with_rank(J @ J.t(), who)
    return J.t() @ w, int(rank)


def truth(retain: Tensor, forget: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    tol = dependence_tolerance(dtype)
    return reference.orthograd({"a": retain.double()}, {"a": forget.double()}, alpha, tol)


def gram_limit(cond: float) -> float:
    """Solving on the Gram matrix instead of the rows costs a small multiple of cond² eps of float64."""
    return 64 * EPS64 * max(cond**2, 100.0)


def compare(retain: Tensor, forget: Tensor, alpha: float = 0.0) -> tuple[float, int]:
    """Relative error of the direction against QR, and the rank found."""
    who = roles_of(len(retain), len(forget), retain.dtype)
    found, rank = direction(torch.cat([retain, forget]), who, alpha)
    return relative_error(found, truth(retain, forget, alpha, retain.dtype)), rank


@pytest.mark.parametrize("cond", CONDITIONS)
def test_random_gradient_on_float32_rows(cond: float) -> None:
    """Truth: float64 on the same float32 rows. Beyond cond 1e3 the bound of the equal-weight case holds."""
    for seed in range(5):
        J = matrices.conditioned(32, 300, cond, seed).float()
        error, rank = compare(J, matrices.random_vector(300, seed).float()[None])
        print(f"cond {cond:.0e}, random g: relative error {error:.1e}")
        assert rank == 32
        assert error <= (1e-5 if cond <= 1e3 else 64 * EPS32 * cond)
        assert error <= gram_limit(cond)


@pytest.mark.parametrize("cond", CONDITIONS)
def test_equal_weight_on_all_directions_on_float32_rows(cond: float) -> None:
    for seed in range(5):
        J = matrices.conditioned(32, 300, cond, seed).float()
        error, rank = compare(J, matrices.balanced_vector(J, seed).float()[None])
        print(f"cond {cond:.0e}, equal weights: relative error {error:.1e}")
        assert rank == 32
        assert error <= 64 * EPS32 * cond
        assert error <= gram_limit(cond)


@pytest.mark.parametrize("cond", CONDITIONS)
def test_float64_rows(cond: float) -> None:
    J = matrices.conditioned(20, 100, cond)
    error, rank = compare(J, matrices.random_vector(100)[None], alpha=0.5)
    assert rank == 20
    assert error <= gram_limit(cond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "rank"),
    [
        (matrices.with_duplicates(matrices.conditioned(8, 50, 60.0)), 8),
        (matrices.with_duplicates(matrices.conditioned(6, 50, 6.0), times=4), 6),
        (matrices.with_zero_row(matrices.conditioned(8, 50, 60.0), at=3), 7),
        (matrices.low_rank(12, 50, rank=5), 5),
        (matrices.conditioned(30, 12, 60.0), 12),
        (matrices.scaled(matrices.conditioned(9, 50, 6.0), decades=6), 9),
        (torch.zeros(4, 50, dtype=torch.float64), 0),
    ],
    ids=[
        "duplicated",
        "four copies",
        "zero row",
        "low rank",
        "more rows than P",
        "unequal lengths",
        "all zero",
    ],
)
def test_dependent_rows(rows: Tensor, rank: int, dtype: torch.dtype) -> None:
    """The update is that of the independent rows, the rank is reported, the weights stay moderate."""
    rows = rows.to(dtype)
    forget = torch.stack([matrices.random_vector(rows.shape[1], seed) for seed in (1, 2)]).to(dtype)
    who = roles_of(len(rows), 2, dtype)
    J = torch.cat([rows, forget])
    found, seen = direction(J, who, alpha=0.0)
    expected = truth(rows, forget, 0.0, dtype)
    scale = forget.double().mean(0).norm()
    assert seen == rank
    assert (found - expected).norm() <= 1e-5 * scale
    weights = OrthoGrad(0.0)(J.double() @ J.double().t(), who)
    length = rows.double().norm(dim=1)
    assert (weights[: len(rows)].abs() * length).max() <= 1e3 * scale


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_a_repeated_sample_protects_no_more(copies: int) -> None:
    """Without rank handling, QR completes duplicates by arbitrary directions and removes those too."""
    J, g = matrices.conditioned(6, 40, 6.0), matrices.random_vector(40)[None]
    once, _ = direction(torch.cat([J, g]), roles_of(6, 1), 0.0)
    many, rank = direction(torch.cat([J.repeat(copies, 1), g]), roles_of(6 * copies, 1), 0.0)
    assert rank == 6
    assert relative_error(many, once) <= 1e-12


def test_each_layer_on_its_own() -> None:
    """A batch of Gram matrices, one a layer, against the reference layer by layer; ranks differ."""
    widths = {"wide": 60, "narrow": 4, "mid": 20}
    retain = {
        name: matrices.conditioned(8, width, 30.0, seed)
        for seed, (name, width) in enumerate(widths.items())
    }
    forget = {name: matrices.conditioned(3, width, 3.0, 9) for name, width in widths.items()}
    J = {name: torch.cat([retain[name], forget[name]]) for name in widths}
    w, rank = OrthoGrad(0.4).with_rank(
        torch.stack([rows @ rows.t() for rows in J.values()]), roles_of(8, 3)
    )
    expected = reference.orthograd_blocks(
        {name: {"a": rows} for name, rows in retain.items()},
        {name: {"a": rows} for name, rows in forget.items()},
        0.4,
    )
    assert rank.tolist() == [8, 4, 8]
    for i, name in enumerate(widths):
        assert relative_error(J[name].t() @ w[i], expected[name]) <= 1e-11


def test_a_block_smaller_than_the_retain_set_never_unlearns() -> None:
    J = torch.cat([matrices.conditioned(8, 4, 3.0), matrices.random_vector(4)[None]])
    d, _ = direction(J, roles_of(8, 1), alpha=0.0)
    assert d.norm() <= 1e-12


def test_tasks_have_their_own_means_and_share_the_constraints() -> None:
    kinds = [RETAIN, RETAIN, RETAIN, FORGET, RETAIN, FORGET, FORGET]
    tasks = [0, 0, 0, 0, 1, 1, 1]
    J = matrices.conditioned(7, 30, 20.0)
    d, rank = direction(J, roles(kinds, tasks), 0.3)
    expected = reference.orthograd({"a": J[:3], "b": J[4:5]}, {"a": J[3:4], "b": J[5:]}, 0.3)
    assert rank == 4
    assert relative_error(d, expected) <= 1e-12


@pytest.mark.parametrize(
    ("G", "retain", "alpha", "expected"),
    [
        ([[4.0, 2.0], [2.0, 3.0]], 1, 0.5, [0.5 + 0.5 * 0.5, -0.5]),  # one retain, one forget row
        # forget row inside the span
        ([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8], [0.6, 0.8, 1.0]], 2, 0.0, [0.6, 0.8, -1.0]),
        ([[1.0, 0.0], [0.0, 1.0]], 1, 0.25, [0.25, -0.75]),  # nothing to remove
        ([[0.0, 0.0], [0.0, 5.0]], 1, 0.5, [0.5, -0.5]),  # a zero retain row
        ([[2.0, 1.0], [1.0, 2.0]], 2, 0.6, [0.3, 0.3]),  # no forget rows
        ([[2.0, 1.0], [1.0, 2.0]], 0, 0.6, [-0.2, -0.2]),  # no retain rows
        ([[3.0]], 1, 0.6, [0.6]),
        ([[3.0]], 0, 0.6, [-0.4]),
    ],
)
def test_weights(G: list[list[float]], retain: int, alpha: float, expected: list[float]) -> None:
    found = OrthoGrad(alpha)(
        torch.tensor(G, dtype=torch.float64), roles_of(retain, len(G) - retain)
    )
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15
    )


def test_no_rows_at_all() -> None:
    w, rank = OrthoGrad().with_rank(torch.zeros(0, 0, dtype=torch.float64), roles([]))
    assert w.shape == (0,) and int(rank) == 0


@pytest.mark.parametrize("seed", range(4))
def test_retain_rows_feel_their_mean_only(seed: int) -> None:
    """<g_i, d> = alpha <g_i, mean retain gradient> for every retain row i, whatever is forgotten."""
    J = matrices.conditioned(14, 40, 100.0, seed)
    d, _ = direction(J, roles_of(10, 4), 0.35)
    felt = J[:10] @ d
    assert (felt - 0.35 * J[:10] @ J[:10].mean(0)).norm() <= 1e-10 * J[:10].norm() * d.norm()


@pytest.mark.parametrize("seed", range(4))
def test_does_not_depend_on_the_order_of_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    J, kinds = matrices.conditioned(12, 40, 50.0, seed), [RETAIN] * 8 + [FORGET] * 4
    order = torch.randperm(12, generator=generator)
    plain, _ = direction(J, roles(kinds), 0.5)
    moved, _ = direction(J[order], roles([kinds[i] for i in order]), 0.5)
    assert relative_error(moved, plain) <= 1e-11


@pytest.mark.parametrize("factor", [1e-8, 1.0, 1e8])
def test_weights_do_not_depend_on_the_scale_of_the_loss(factor: float) -> None:
    """Hence a loss scaler is harmless: d scales with the gradients."""
    J = matrices.conditioned(12, 40, 50.0)
    G, who = J @ J.t(), roles_of(8, 4)
    assert relative_error(OrthoGrad()(factor**2 * G, who), OrthoGrad()(G, who)) <= 1e-11


def test_retain_rows_of_unequal_length_do_not_matter_for_the_projection() -> None:
    """The span is what counts: scaling retain rows changes their weights, not what is left of the forget gradient."""
    J, g = matrices.conditioned(8, 40, 50.0), matrices.random_vector(40)[None]
    plain, _ = direction(torch.cat([J, g]), roles_of(8, 1), 0.0)
    uneven, _ = direction(torch.cat([matrices.scaled(J, decades=5), g]), roles_of(8, 1), 0.0)
    assert relative_error(uneven, plain) <= 1e-9


def test_outside_is_the_update_before_orthogonalisation() -> None:
    expected = torch.tensor([0.15, 0.15, -0.35, -0.35], dtype=torch.float64)
    torch.testing.assert_close(OrthoGrad(0.3).outside(roles_of(2, 2)), expected, rtol=1e-14, atol=0)


def test_a_correction_removes_what_retain_rows_feel() -> None:
    """Of any direction, by weights of retain rows alone; the constrained part is what alpha r is added to."""
    J, who = matrices.conditioned(12, 40, 50.0), roles_of(8, 4)
    method, G = OrthoGrad(0.3), J @ J.t()
    w = method(G, who)
    constraint = method.constraint(G, who, w)
    assert (J[:8] @ (J.t() @ constraint.part)).norm() <= 1e-12
    assert (
        relative_error((w - constraint.part)[:8], torch.full((8,), 0.3 / 8, dtype=torch.float64))
        <= 1e-12
    )
    d = matrices.random_vector(40)
    c = constraint.correction(J @ d)
    assert not c[8:].any()
    assert (J[:8] @ (d - J.t() @ c)).norm() <= 1e-11 * d.norm()
