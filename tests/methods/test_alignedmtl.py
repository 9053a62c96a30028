"""Aligned-MTL: rows made orthogonal and equally long."""

from __future__ import annotations

import pytest
import torch

from mtu_fast.methods import FORGET, RETAIN, AlignedMTL
from mtu_fast.reference.alignedmtl import alignedmtl
from tests.helpers import matrices
from tests.helpers.matrices import roles, roles_of
from tests.helpers.truth import relative_error


@pytest.mark.parametrize("cond", [2.0, 1e3])
def test_the_aligned_rows_are_orthogonal_and_as_long_as_the_smallest_singular_value(
    cond: float,
) -> None:
    """One direction for each p = e_i; together they are the aligned Jacobian."""
    J, who = matrices.conditioned(4, 9, cond), roles([RETAIN] * 4, [0, 1, 2, 3])
    aligned = torch.stack([
        J.t() @ AlignedMTL({task: float(task == chosen) for task in who.tasks})(J @ J.t(), who)
        for chosen in who.tasks
    ])
    smallest = torch.linalg.svdvals(J)[-1]
    assert (
        relative_error(aligned @ aligned.t(), smallest**2 * torch.eye(4, dtype=torch.float64))
        <= 1e-8
    )


@pytest.mark.parametrize(
    ("G", "kinds", "expected"),
    [
        ([[9.0]], [FORGET], [-1.0]),
        ([[1.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [0.5, 0.25]),  # the long row is shortened
        ([[1.0, 0.0], [0.0, 4.0]], [RETAIN, FORGET], [0.5, -0.25]),
        # eigenvalues 0.5 on (1, 1) and 1.5 on (1, -1): p lies along the first
        ([[1.0, -0.5], [-0.5, 1.0]], [RETAIN, RETAIN], [0.5, 0.5]),
        ([[1.0, 0.5], [0.5, 1.0]], [RETAIN, RETAIN], [0.5 / 3**0.5] * 2),
        # one direction: rank one is left as it is
        ([[1.0, 1.0], [1.0, 1.0]], [RETAIN, RETAIN], [0.5, 0.5]),
        ([[1.0, -1.0], [-1.0, 1.0]], [RETAIN, RETAIN], [0.0, 0.0]),  # opposite
        ([[0.0, 0.0], [0.0, 4.0]], [RETAIN, RETAIN], [0.0, 0.5]),
        ([[0.0, 0.0], [0.0, 0.0]], [RETAIN, FORGET], [0.0, 0.0]),
    ],
)
def test_weights(G: list[list[float]], kinds: list[int], expected: list[float]) -> None:
    w = AlignedMTL()(torch.tensor(G, dtype=torch.float64), roles(kinds))
    assert w.tolist() == pytest.approx(expected, abs=1e-14)


def test_preference_is_by_task_for_both_kinds() -> None:
    J, who = matrices.conditioned(3, 6, 5.0), roles([RETAIN, FORGET, RETAIN], [0, 0, 1])
    method, p = (
        AlignedMTL({"b": 2.0, "a": 0.5, "unused": 7.0}),
        torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64),
    )
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    assert relative_error(J.t() @ method(J @ J.t(), who), alignedmtl(sign[:, None] * J, p)) <= 1e-12
    assert method.outside(who).tolist() == [0.5, -0.5, 2.0]


@pytest.mark.parametrize(("dtype", "gap", "rank"), [
    (torch.float64, 1e-6, 2), (torch.float64, 1e-8, 1), (torch.float32, 1e-5, 2), (torch.float32, 1e-7, 1),
])  # fmt: skip
def test_directions_below_the_tolerance_are_left_out(
    dtype: torch.dtype, gap: float, rank: int
) -> None:
    """Rows (1, ±gap), singular values √2 and √2 gap, p = (½, ½): d = (1, 0) of rank one, (gap, 0) of rank two."""
    J = torch.tensor([[1.0, gap], [1.0, -gap]], dtype=torch.float64)
    d = J.t() @ AlignedMTL()(J @ J.t(), roles_of(2, 0, dtype))
    assert float(d.norm()) == pytest.approx(1.0 if rank == 1 else gap, rel=1e-3)


def test_refuses_preferences_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match=r"preference is list, expected \{task: weight\}"):
        AlignedMTL([1.0, 2.0])
    with pytest.raises(ValueError, match=r"preference\['a'\]: found -1.0"):
        AlignedMTL({"a": -1.0})
    with pytest.raises(
        ValueError, match="preference names a, but there are rows of b; give every task a weight"
    ):
        AlignedMTL({"a": 1.0})(torch.eye(2, dtype=torch.float64), roles([RETAIN, RETAIN], [0, 1]))
