"""∇τ: its weights are the gradient of its loss, the ascent ends at τ, and the schedule is the derived one."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from mtu_fast import reference
from mtu_fast.methods import FORGET, RETAIN, Method, NablaTau, Roles
from tests.helpers.matrices import conditioned, roles
from tests.helpers.truth import relative_error

KINDS, TASKS = [RETAIN, FORGET, FORGET, RETAIN, RETAIN, FORGET], [0, 0, 0, 1, 1, 1]


def _roles(losses: list[float]) -> Roles:
    r = roles(KINDS, TASKS)
    return Roles(
        r.task, r.sample, r.kind, torch.tensor(losses, dtype=torch.float64), r.tasks, r.dtype
    )


def _prepared(**tau: float) -> NablaTau:
    """alpha = 1/4 in the first epoch, of 18."""
    method = NablaTau()
    method.prepare(forget=15, retain=85, forget_batches=1, retain_batches=6)
    method.start_epoch(0, lambda: tau)
    return method


def test_weights_by_hand() -> None:
    """Task a: L = 0.3, τ = 0.8, so -2 · 1/4 · 0.5 / 2 each. Task b has passed its τ: no ascent."""
    found = _prepared(a=0.8, b=1.0)(None, _roles([9, 0.2, 0.4, 9, 9, 1.5]))
    expected = torch.tensor([0.75, -0.125, -0.125, 0.375, 0.375, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-16)
    assert torch.equal(found, _prepared(a=0.8, b=1.0).outside(_roles([9, 0.2, 0.4, 9, 9, 1.5])))


def test_a_loss_that_is_not_finite_stays_in_its_task() -> None:
    found = _prepared(a=0.8, b=1.0)(None, _roles([9, 0.2, 0.4, 9, 9, float("inf")]))
    expected = torch.tensor([0.75, -0.125, -0.125, 0.375, 0.375, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-16)


def test_weights_are_the_derivative_of_the_papers_loss() -> None:
    losses = [0.1, 0.2, 0.4, 0.3, 0.2, 0.7]
    l = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    ascent = (
        0.25 * torch.relu(0.8 - l[1:3].mean()) ** 2 + 0.25 * torch.relu(0.9 - l[5:].mean()) ** 2
    )
    (ascent + 0.75 * (l[:1].mean() + l[3:5].mean())).backward()
    torch.testing.assert_close(
        _prepared(a=0.8, b=0.9)(None, _roles(losses)), l.grad, rtol=1e-14, atol=1e-16
    )


def test_is_the_reference() -> None:
    J, losses = conditioned(6, 9, 10.0), [0.1, 0.2, 0.4, 0.3, 0.2, 0.7]
    values = _roles(losses).loss
    truth = reference.nabla_tau(
        {"a": J[:1], "b": J[3:5]}, {"a": J[1:3], "b": J[5:]}, {"a": values[1:3], "b": values[5:]},
        {"a": 0.8, "b": 0.9}, 0.25,
    )  # fmt: skip
    assert relative_error(J.t() @ _prepared(a=0.8, b=0.9)(None, _roles(losses)), truth) < 1e-14


@pytest.mark.parametrize("kind", [RETAIN, FORGET])
def test_one_side_alone(kind: int) -> None:
    w = _prepared(a=0.8)(None, roles([kind, kind]))
    expected = {RETAIN: 0.375, FORGET: -2 * 0.25 * 0.8 / 2}[kind]
    torch.testing.assert_close(
        w, torch.full((2,), expected, dtype=torch.float64), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize(
    ("forget", "retain", "batches", "alpha", "epochs"),
    [
        (10, 90, (1, 9), 1 / 6, 27),
        (30, 70, (2, 7), 0.5, 10),  # 6 · 7 / 4 = 10.5
        (1, 999, (1, 10), 5 / 3000, 30),
        (30, 70, (3, 1), 0.5, 1),
    ],
)
def test_schedule_is_derived(
    forget: int, retain: int, batches: tuple[int, int], alpha: float, epochs: int
) -> None:
    method = NablaTau()
    method.prepare(
        forget=forget, retain=retain, forget_batches=batches[0], retain_batches=batches[1]
    )
    assert method.epochs == epochs
    assert method.alpha == pytest.approx(alpha, rel=1e-14)


def test_alpha_falls_by_the_same_amount_to_zero_and_tau_is_refreshed_every_five_epochs() -> None:
    method, seen = NablaTau(), []
    method.prepare(forget=3, retain=27, forget_batches=1, retain_batches=4)  # alpha 1/6, 12 epochs
    for epoch in range(13):

        def validation(at: int = epoch) -> dict[str, float]:
            seen.append(at)
            return {"a": float(at)}

        method.start_epoch(epoch, validation)
        assert method.alpha == pytest.approx((12 - epoch) / 72, abs=1e-15)
        assert method.tau == {"a": float(epoch - epoch % 5)}
    assert seen == [0, 5, 10]


def test_state_is_all_there_is() -> None:
    one, other = _prepared(a=0.8, b=0.9), NablaTau()
    other.load_state_dict(one.state_dict())
    r = _roles([0.1, 0.2, 0.4, 0.3, 0.2, 0.7])
    assert torch.equal(one(None, r), other(None, r))
    assert other.state_dict() == one.state_dict() and other.epochs == 18


def test_follows_the_protocol_and_never_waits_for_the_device() -> None:
    method = _prepared(a=0.8, b=0.9)
    assert isinstance(method, Method)
    r = _roles([0.0] * 6)
    task, sample, kind, loss = (column.to("meta") for column in (r.task, r.sample, r.kind, r.loss))
    w: Tensor = method(None, Roles(task, sample, kind, loss, r.tasks, r.dtype))
    assert w.device.type == "meta" and w.shape == (6,)


def test_more_than_thirty_percent_warns_and_more_than_sixty_is_refused() -> None:
    method = NablaTau()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.prepare(forget=30, retain=70, forget_batches=3, retain_batches=7)
    with pytest.warns(UserWarning, match=r"31 of 100 samples .*31%.*30 %"):
        method.prepare(forget=31, retain=69, forget_batches=3, retain_batches=7)
    with pytest.raises(ValueError, match=r"61 of 100 samples.*negative weight.*Retrain on the 39"):
        method.prepare(forget=61, retain=39, forget_batches=3, retain_batches=7)


def test_errors() -> None:
    with pytest.raises(RuntimeError, match=r"alpha and τ are not known.*mtu.unlearn.*prepare"):
        NablaTau()(None, roles([RETAIN]))
    with pytest.raises(RuntimeError, match="before prepare"):
        NablaTau().start_epoch(0, dict)
    with pytest.raises(ValueError, match=r"no τ for tasks \['b'\]"):
        _prepared(a=0.8)(None, _roles([0.0] * 6))
    retained = _roles([0.1, 0.2, 0.4, 9, 9, 1.5])
    retained.kind[5] = RETAIN  # task b has no forget rows, and so needs no τ
    assert torch.equal(_prepared(a=0.8)(None, retained), _prepared(a=0.8, b=7.0)(None, retained))
    with pytest.raises(ValueError, match="forget: found 0, expected at least 1"):
        NablaTau().prepare(forget=0, retain=1, forget_batches=1, retain_batches=1)
