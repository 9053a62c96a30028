"""GDR-GMA: rectified directions, magnitudes by the retain loss, tensor by tensor."""

from __future__ import annotations

from math import exp

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast import reference
from mtu_fast.methods import FORGET, GDRGMA, RETAIN, Roles
from tests.helpers.checks import clear, grad_vector
from tests.helpers.matrices import roles
from tests.helpers.truth import relative_error
from tests.helpers.zoo import by_name

MASK = torch.tensor([True, False, False, True, False, False])


def with_loss(who: Roles, loss: list[float]) -> Roles:
    return Roles(
        who.task,
        who.sample,
        who.kind,
        torch.tensor(loss, dtype=torch.float64),
        who.tasks,
        who.dtype,
    )


def weights(G: list[list[float]], loss: float) -> list[float]:
    who = with_loss(roles([RETAIN, FORGET]), [loss, 0.0])
    found: Tensor = GDRGMA()(torch.tensor(G, dtype=torch.float64), who)
    return found.tolist()


def test_half_and_half_at_the_threshold() -> None:
    assert weights([[1.0, 0.0], [0.0, 4.0]], 0.02) == [0.5, -0.5]
    # forgetting helps: nothing to rectify
    assert weights([[1.0, -1.0], [-1.0, 4.0]], 0.02) == [0.5, -0.5]


def test_a_conflict_by_hand() -> None:
    """r = g_r, f = -g_f, <r, f> = -1, ‖r‖² = 1, ‖f‖² = 4: r' = r + f/4, f' = f + r' = r + 5/4 f; half of each."""
    assert weights([[1.0, 1.0], [1.0, 4.0]], 0.02) == pytest.approx([1.0, -0.75], rel=1e-14)


@pytest.mark.parametrize(
    ("loss", "share"), [(0.0, 1 / (1 + exp(-2.0))), (0.05, 1 / (1 + exp(3.0))), (9.0, 0.0)]
)
def test_the_forget_side_counts_while_the_retain_loss_is_low(loss: float, share: float) -> None:
    assert weights([[1.0, 0.0], [0.0, 1.0]], loss) == pytest.approx([1 - share, -share], abs=1e-15)


def test_the_loss_is_the_mean_over_tasks_of_means_over_samples() -> None:
    """Tasks a (retain losses 0.01 and 0.03) and b (0.06), c without retain rows: (0.02 + 0.06) / 2."""
    who = with_loss(roles([RETAIN, RETAIN, RETAIN, FORGET], [0, 0, 1, 2]), [0.01, 0.03, 0.06, 50.0])
    assert float(GDRGMA().forget_share(who)) == pytest.approx(1 / (1 + exp(2.0)), rel=1e-12)
    assert float(GDRGMA(slope=10.0, threshold=0.14).forget_share(who)) == pytest.approx(
        1 / (1 + exp(-1.0)), rel=1e-12
    )


def test_a_forget_loss_that_is_not_finite_does_not_count() -> None:
    who = with_loss(roles([RETAIN, FORGET]), [0.02, torch.inf])
    assert float(GDRGMA().forget_share(who)) == 0.5


def test_without_retain_rows_the_loss_is_zero() -> None:
    who = with_loss(roles([FORGET]), [3.0])
    assert GDRGMA()(torch.ones(1, 1, dtype=torch.float64), who).tolist() == pytest.approx([
        -1 / (1 + exp(-2.0))
    ])


def test_zero_rows_conflict_with_nothing() -> None:
    assert (
        weights([[0.0, 0.0], [0.0, 4.0]], 0.02)
        == weights([[4.0, 0.0], [0.0, 0.0]], 0.02)
        == [0.5, -0.5]
    )


@pytest.mark.parametrize("granularity", ["tensor", "layer", "global"])
@pytest.mark.parametrize("forget", [MASK, {"b": MASK}])
def test_a_step_is_that_of_the_reference(
    granularity: str, forget: Tensor | dict[str, Tensor]
) -> None:
    """Heads outside, blocks of parameters on their own, weights that depend on the losses."""
    model, forward = by_name("mlp").build(2, 6)
    params, heads = list(model.backbone.parameters()), list(model.heads.parameters())
    blocks = {"tensor": [[0], [1], [2], [3]], "layer": [[0, 1], [2, 3]], "global": None}[
        granularity
    ]
    level = float(torch.stack([loss.detach().mean() for loss in forward().values()]).mean())
    options = {"slope": 1.0, "threshold": level}
    reference.backward(
        params, forward(), "gdrgma", forget=forget, outside=heads, blocks=blocks, **options
    )
    expected = grad_vector([*params, *heads])
    clear([*params, *heads])
    engine = mtu.Engine(model, params=model.backbone.parameters())
    engine.backward(forward(), GDRGMA(granularity, **options), forget=forget)
    assert relative_error(grad_vector([*params, *heads]), expected) <= 1e-10


def test_refuses_other_granularities_and_numbers() -> None:
    with pytest.raises(ValueError, match="granularity: found 'channel'"):
        GDRGMA("channel")
    with pytest.raises(ValueError, match=r"slope: found -1\.0"):
        GDRGMA(slope=-1.0)
