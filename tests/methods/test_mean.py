"""Mean and GradDiff: weights by hand, and against the reference on explicit rows."""

from __future__ import annotations

import pytest
import torch

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, GradDiff, Mean
from tests.helpers.matrices import conditioned, roles, roles_of
from tests.helpers.truth import relative_error

KINDS, TASKS = [RETAIN, FORGET, RETAIN, RETAIN, FORGET, FORGET], [0, 0, 0, 1, 1, 1]


def _split(J: torch.Tensor, kind: int) -> dict[str, torch.Tensor]:
    of, what = torch.tensor(TASKS), torch.tensor(KINDS)
    return {str(t): J[(of == t) & (what == kind)] for t in (0, 1)}


def test_mean_weighs_every_row_of_a_task_alike() -> None:
    expected = torch.tensor([1 / 3] * 3 + [0.25] * 4, dtype=torch.float64)
    r = roles([RETAIN, FORGET, RETAIN, FORGET, FORGET, RETAIN, RETAIN], [0, 0, 0, 1, 1, 1, 1])
    assert torch.equal(Mean()(None, r), expected)
    assert torch.equal(Mean().outside(r), expected)


def test_mean_is_the_reference() -> None:
    J = conditioned(6, 8, 10.0)
    truth = reference.mean({"a": J[:3], "b": J[3:]})
    assert relative_error(J.t() @ Mean()(None, roles(KINDS, TASKS)), truth) < 1e-14


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_graddiff_is_the_reference(alpha: float) -> None:
    J = conditioned(6, 8, 10.0)
    truth = reference.graddiff(_split(J, RETAIN), _split(J, FORGET), alpha)
    found = GradDiff(alpha)(None, roles(KINDS, TASKS))
    assert relative_error(J.t() @ found, truth) < 1e-14
    assert torch.equal(found, GradDiff(alpha).outside(roles(KINDS, TASKS)))


@pytest.mark.parametrize(
    ("retain", "forget", "expected"),
    [
        (2, 1, [0.15, 0.15, -0.7]),
        (3, 0, [0.1, 0.1, 0.1]),
        (0, 2, [-0.35, -0.35]),
        (0, 0, []),
    ],
)
def test_graddiff_weights(retain: int, forget: int, expected: list[float]) -> None:
    found = GradDiff(alpha=0.3)(None, roles_of(retain, forget))
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_ascent_leaves_retain_rows_alone() -> None:
    expected = torch.tensor([0, 0, -0.5, -0.5], dtype=torch.float64)
    assert torch.equal(GradDiff(alpha=0.0)(None, roles_of(2, 2)), expected)


def test_neither_needs_a_gram() -> None:
    assert not Mean.needs_gram and not GradDiff.needs_gram
