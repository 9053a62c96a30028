"""GradVac: the paper's loop with its memory, kept by the names of the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast.methods import FORGET, RETAIN, GradVac, PCGrad, Roles
from mtu_fast.methods._orders import visiting_orders
from mtu_fast.reference.gradvac import gradvac
from tests.helpers import matrices
from tests.helpers.matrices import roles
from tests.helpers.truth import relative_error

KINDS, TASKS = [RETAIN, FORGET, RETAIN, FORGET], [0, 0, 1, 1]
SIGN = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)


def rows_at(step: int, shift: float = 0.0) -> Tensor:
    """[4, 6], a new one each step; `shift` makes the signed rows agree."""
    J = torch.stack([matrices.random_vector(6, 10 * step + r) for r in range(4)])
    return SIGN[:, None] * (J + shift)


@pytest.mark.parametrize("shift", [0.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_is_the_papers_loop_step_after_step(beta: float, shift: float) -> None:
    method = GradVac(beta)
    targets: dict[Any, float] = {}
    for step in range(5):
        J = rows_at(step, shift)
        w = method(J @ J.t(), roles(KINDS, TASKS))
        assert relative_error(J.t() @ w, gradvac(SIGN[:, None] * J, targets, beta)) <= 1e-10


def test_is_the_papers_loop_in_drawn_order() -> None:
    method, orders = (
        GradVac(0.5, torch.Generator().manual_seed(1)),
        torch.Generator().manual_seed(1),
    )
    targets: dict[Any, float] = {}
    for step in range(4):
        J = rows_at(step)
        w = method(J @ J.t(), roles(KINDS, TASKS))
        drawn = visiting_orders(4, orders).tolist()
        assert (
            relative_error(J.t() @ w, gradvac(SIGN[:, None] * J, targets, 0.5, orders=drawn))
            <= 1e-10
        )


def test_without_memory_it_is_pcgrad() -> None:
    method = GradVac(beta=0.0)
    for step in range(3):
        J = rows_at(step)
        G, who = J @ J.t(), roles(KINDS, TASKS)
        assert relative_error(method(G, who), PCGrad()(G, who)) <= 1e-12


def test_two_rows_by_hand() -> None:
    """Rows (1, 0) and (0, 2) after a call that met cosine 0.6 with beta = 1: each is turned to the cosine 0.6.

    c_1 gains 1 · 0.6 / (2 · 0.8) = 3/8 of the second, c_2 gains 2 · 0.6 / (1 · 0.8) = 3/2 of the
    first.
    """
    method, who = GradVac(beta=1.0), roles([RETAIN, RETAIN], [0, 1])
    first = method(torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64), who)
    second = method(torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64), who)
    assert first.tolist() == [1.0, 1.0]
    assert second.tolist() == pytest.approx([1 + 3 / 2, 1 + 3 / 8], rel=1e-14)
    assert method.state_dict()["targets"][0, 2] == 0.0  # the cosine of the last call


def test_targets_belong_to_kind_and_task_not_to_the_place_of_a_row() -> None:
    """Rows that agree are not changed on the first call, so the cosines met are theirs in whatever order they come."""
    J, order = rows_at(0, 2.0), torch.tensor([2, 1, 3, 0])
    cosines = (
        torch.nn.functional.normalize(SIGN[:, None] * J)
        @ torch.nn.functional.normalize(SIGN[:, None] * J).t()
    )
    assert (cosines > 0).all()
    method, who = GradVac(0.5), roles(KINDS, TASKS)
    there = Roles(
        1 - who.task[order],
        who.sample[order],
        who.kind[order],
        who.loss[order],
        ("b", "a"),
        who.dtype,
    )
    method(J[order] @ J[order].t(), there)
    state = method.state_dict()
    assert state["tasks"] == ["b", "a"]
    expected = 0.5 * (cosines - torch.eye(4, dtype=torch.float64))[[2, 3, 0, 1]][:, [2, 3, 0, 1]]
    assert relative_error(state["targets"], expected) <= 1e-12


def test_two_rows_in_either_order_share_targets() -> None:
    """With two rows there is one order of meeting, so weights follow the rows exactly."""
    method, turned = GradVac(0.4), GradVac(0.4)
    who = roles([RETAIN, FORGET], [0, 1])
    other = Roles(
        torch.tensor([0, 1]), who.sample, who.kind.flip(0), who.loss, ("b", "a"), who.dtype
    )
    for step in range(5):
        J = rows_at(step)[:2]
        w = method(J @ J.t(), who) if step % 2 else method(J.flip(0) @ J.flip(0).t(), other).flip(0)
        assert relative_error(w, turned(J @ J.t(), who)) <= 1e-12


def test_a_task_that_misses_a_step_keeps_its_targets() -> None:
    method, who = GradVac(1.0), roles([RETAIN, RETAIN, RETAIN], [0, 1, 2])
    J = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.8, 0.0, 0.6]], dtype=torch.float64)
    method(J @ J.t(), who)
    few = J[:2]
    method(0.0 * few @ few.t() + torch.eye(2, dtype=torch.float64), roles([RETAIN, RETAIN], [0, 1]))
    targets = method.state_dict()["targets"]
    assert targets[0, 2] == 0.0 and targets[0, 4] == pytest.approx(0.8, rel=1e-14)


def test_goes_on_from_its_state() -> None:
    method = GradVac(0.3, torch.Generator().manual_seed(0))
    who = roles(KINDS, TASKS)
    for step in range(3):
        method(rows_at(step) @ rows_at(step).t(), who)
    resumed = GradVac(0.3, torch.Generator().manual_seed(9))
    resumed.load_state_dict(method.state_dict())
    for step in range(3, 6):
        G = rows_at(step) @ rows_at(step).t()
        assert torch.equal(method(G, who), resumed(G, who))


def test_a_new_one_has_no_state() -> None:
    fresh = GradVac()
    assert fresh.state_dict() == {"tasks": [], "targets": None, "generator": None}
    used = GradVac()
    used(torch.eye(4, dtype=torch.float64), roles(KINDS, TASKS))
    used.load_state_dict(fresh.state_dict())
    assert used.state_dict()["targets"] is None


def test_rows_of_one_name_move_their_target_by_the_mean() -> None:
    """Two rows of task a (micro-batches) with cosines 0.6 and 0.0 to the row of b: the target moves to 0.3."""
    method, who = GradVac(1.0), roles([RETAIN, RETAIN, RETAIN], [0, 0, 1])
    J = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    method(J @ J.t(), who)
    assert method.state_dict()["targets"][2, 0] == pytest.approx(0.3, rel=1e-14)


def test_opposite_rows_vanish_and_a_target_of_one_is_out_of_reach() -> None:
    method, who = GradVac(1.0), roles([RETAIN, RETAIN], [0, 1])
    same, opposite = (
        torch.ones(2, 2, dtype=torch.float64),
        torch.tensor([[1.0, -1], [-1, 1]], dtype=torch.float64),
    )
    assert method(opposite, who).tolist() == [2.0, 2.0]
    assert method(same, who).tolist() == [1.0, 1.0]
    assert method(torch.eye(2, dtype=torch.float64), who).tolist() == [1.0, 1.0]


def test_refuses_a_batch_of_another_shape() -> None:
    method = GradVac()
    method(torch.eye(4, dtype=torch.float64).expand(3, 4, 4), roles(KINDS, TASKS))
    with pytest.raises(ValueError, match=r"batch shape \(2,\), but the targets have \(3,\)"):
        method(torch.eye(4, dtype=torch.float64).expand(2, 4, 4), roles(KINDS, TASKS))


def test_refuses_what_is_no_share_and_no_generator() -> None:
    with pytest.raises(ValueError, match=r"beta: found 1.5, expected a number in \[0, 1\]"):
        GradVac(beta=1.5)
    with pytest.raises(TypeError, match="beta: found 'fast'"):
        GradVac(beta="fast")
    with pytest.raises(TypeError, match="generator: found int"):
        GradVac(generator=3)
