"""Levelled OrthoGrad in Gram space against QR on two sets of constraints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast.methods import FORGET, MEMORY, RESTING, RETAIN, LevelledOrthoGrad, OrthoGrad, Roles
from mtu_fast.methods._memory import FADED
from mtu_fast.methods.roles import mean_weights
from mtu_fast.reference.levelled import across, levelled_orthograd
from tests.helpers import matrices
from tests.helpers.matrices import roles
from tests.helpers.truth import relative_error

P, RETAINED, FORGOTTEN = 200, 12, 5


def with_memory(kinds: list[int], tasks: list[int] | None = None) -> Roles:
    """Roles of these kinds, those of kind MEMORY last."""
    found = roles(kinds, tasks)
    return Roles(
        found.task, found.sample, found.kind, found.loss, found.tasks, found.dtype,
        memory=kinds.count(MEMORY),
    )  # fmt: skip


def rows_of(memory: int, seed: int = 0) -> tuple[Tensor, Roles]:
    J = matrices.conditioned(RETAINED + FORGOTTEN + memory, P, 30.0, seed)
    J[RETAINED : RETAINED + FORGOTTEN] += J[:FORGOTTEN]
    kinds = [RETAIN] * RETAINED + [FORGET] * FORGOTTEN + [MEMORY] * memory
    return J, with_memory(kinds)


def truth(J: Tensor, alpha: float) -> Tensor:
    retain, forget = J[:RETAINED], J[RETAINED : RETAINED + FORGOTTEN]
    loss = {"a": torch.zeros(FORGOTTEN)}
    memory = J[RETAINED + FORGOTTEN :]
    return levelled_orthograd(
        {"a": retain}, {"a": forget}, loss, memory, alpha, tau={"a": 1.0}, kappa={}
    )


@pytest.mark.parametrize("memory", [0, 1, 8, 40])
@pytest.mark.parametrize("seed", range(3))
def test_is_the_reference(memory: int, seed: int) -> None:
    J, who = rows_of(memory, seed)
    d = J.t() @ LevelledOrthoGrad(0.3)(J @ J.t(), who)
    assert relative_error(d, truth(J, 0.3)) <= 1e-11


def test_without_a_memory_it_is_orthograd() -> None:
    J, who = rows_of(0)
    assert torch.equal(LevelledOrthoGrad(0.4)(J @ J.t(), who), OrthoGrad(0.4)(J @ J.t(), who))


@pytest.mark.parametrize("seed", range(3))
def test_kept_rows_are_not_moved_along_and_get_no_part_of_the_retain_mean(seed: int) -> None:
    J, who = rows_of(20, seed)
    G = J @ J.t()
    d = J.t() @ LevelledOrthoGrad(0.0)(G, who)
    constraints = torch.cat([J[:RETAINED], J[RETAINED + FORGOTTEN :]])
    assert (constraints @ d).norm() <= 1e-10 * constraints.norm() * d.norm()
    f = J[RETAINED : RETAINED + FORGOTTEN].mean(0)
    assert -(f @ d) >= 0.05 * f.norm() * d.norm()  # and it ascends
    w = LevelledOrthoGrad(1.0)(G, who)
    assert not w[RETAINED:].any()


@pytest.mark.parametrize("shift", [1e-9, 1e-4, 3e-3])
def test_a_kept_row_that_the_step_has_nearly_too_is_left_out(shift: float) -> None:
    """Copies of the step's rows, taken a little before: no weight of theirs grows beyond measure."""
    J, _ = rows_of(0)
    noise = matrices.conditioned(RETAINED, P, 3.0, 9)
    copies = J[:RETAINED] + shift * J[:RETAINED].norm() / P**0.5 * noise / noise.norm()
    whole = torch.cat([J, copies])
    who = with_memory([RETAIN] * RETAINED + [FORGET] * FORGOTTEN + [MEMORY] * RETAINED)
    w, rank = LevelledOrthoGrad(0.3).with_rank(whole @ whole.t(), who)
    assert int(rank) == RETAINED
    plain = OrthoGrad(0.3)(J @ J.t(), with_memory([RETAIN] * RETAINED + [FORGET] * FORGOTTEN))
    assert relative_error(whole.t() @ w, J.t() @ plain) <= 1e-9


def test_dependent_and_zero_rows_of_either_set() -> None:
    J, _ = rows_of(9)
    J[3], J[4] = J[0], 0.0
    J[RETAINED + FORGOTTEN + 2] = J[RETAINED + FORGOTTEN] + J[1]
    J[-1] = 0.0
    who = with_memory([RETAIN] * RETAINED + [FORGET] * FORGOTTEN + [MEMORY] * 9)
    w, rank = LevelledOrthoGrad(0.3).with_rank(J @ J.t(), who)
    assert int(rank) == RETAINED - 2 + 9 - 2
    assert relative_error(J.t() @ w, truth(J, 0.3)) <= 1e-10


def test_rows_of_the_step_are_protected_exactly_whatever_is_kept() -> None:
    J, _ = rows_of(0)
    near = J[:RETAINED].repeat(3, 1) + 5 * FADED * matrices.conditioned(3 * RETAINED, P, 3.0, 4)
    whole = torch.cat([J, near])
    who = with_memory([RETAIN] * RETAINED + [FORGET] * FORGOTTEN + [MEMORY] * 3 * RETAINED)
    d = whole.t() @ LevelledOrthoGrad(0.0)(whole @ whole.t(), who)
    assert ((J[:RETAINED] @ d).abs() <= 1e-10 * J[:RETAINED].norm(dim=1) * d.norm()).all()


def test_each_layer_on_its_own() -> None:
    J, who = rows_of(10)
    blocks = [J[:, :60], J[:, 60:64], J[:, 64:]]
    w = LevelledOrthoGrad(0.4)(torch.stack([b @ b.t() for b in blocks]), who)
    for mine, block in zip(w, blocks, strict=True):
        assert relative_error(block.t() @ mine, truth(block, 0.4)) <= 1e-9


def test_rows_that_rest_are_counted_and_have_no_weight() -> None:
    kinds = [RETAIN, RETAIN, FORGET, RESTING, FORGET, FORGET, RESTING, RESTING]
    tasks = [0, 1, 0, 0, 0, 1, 1, 1]
    f = mean_weights(with_memory(kinds, tasks), FORGET)
    expected = [0.0, 0.0, 1 / 3, 0.0, 1 / 3, 1 / 3, 0.0, 0.0]
    torch.testing.assert_close(f, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("kappa", "resting", "expected"),
    [
        ({}, (), [0.0, 0.5, 0.0]),  # losses 3 and 2 are at the level 2
        ({"a": 1.4}, (), [0.0, 0.5, 0.5]),
        ({"a": 9.0}, (), [0.5, 0.5, 0.5]),
        ({"a": 9.0}, ("a",), [0.0, 0.0, 0.0]),
    ],
)
def test_the_references_levels(
    kappa: dict[str, float], resting: tuple[str, ...], expected: list[float]
) -> None:
    """Of orthogonal rows of length 3, d is minus the weights times these rows."""
    forget = 3.0 * torch.eye(3, 5, dtype=torch.float64)
    loss = {"a": torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)}
    d = levelled_orthograd(
        {"a": forget[:0]}, {"a": forget}, loss, forget[:0], 0.5,
        tau={"a": 2.0}, kappa=kappa, resting=resting,
    )  # fmt: skip
    found = -d[:3]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_the_references_residual_is_orthogonal_to_both_sets() -> None:
    J, _ = rows_of(7)
    g = matrices.random_vector(P)
    b = across(g, J[:RETAINED], J[-7:], 1e-7, 1e-2)
    assert (torch.cat([J[:RETAINED], J[-7:]]) @ b).norm() <= 1e-11 * b.norm() * J.norm()
    Q = torch.linalg.qr(torch.cat([J[:RETAINED], J[-7:]]).t()).Q
    assert relative_error(b, g - Q @ (Q.t() @ g)) <= 1e-10


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"alpha: found 2\.0"):
        LevelledOrthoGrad(2.0)
    with pytest.raises(ValueError, match="granularity"):
        LevelledOrthoGrad(0.5, granularity="module")
