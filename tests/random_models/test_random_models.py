"""1,000 random models whose samples interact: every call is right, or refused where that is stated."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import mtu_fast as mtu
from mtu_fast._graph import taking
from tests.random_models.check import ACCEPTED, REFUSED, RIGHT, UNSTATED, WRONG, outcomes
from tests.random_models.draw import OPERATIONS
from tests.random_models.functions import PARAMETER, RARE_HOOKS
from tests.random_models.generate import model

MODELS, CHUNK, OFTEN = 1000, 25, 15
PLAIN, HOOKED = 18, 80 + len(RARE_HOOKS)  # models without and with a hook on a parameter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("first", range(0, MODELS, CHUNK))
def test_no_model_is_wrong(first: int) -> None:
    """A fault names its seeds: `python -m tests.random_models --seed SEED --shrink` shows one."""
    faults = []
    for seed in range(first, first + CHUNK):
        m = model(seed)
        faults += [f"\n{m}\n{outcome}" for outcome in outcomes(m) if outcome.fault]
    assert not faults, "".join(faults)


@pytest.mark.parametrize("seed", [910962, 920185, 3000156])
def test_models_that_were_wrong_or_warned_of(seed: int) -> None:
    """A clamp that saw the parts of a row one by one; gradients of which rounding is all there is."""
    m = model(seed)
    assert [f"\n{m}\n{outcome}" for outcome in outcomes(m) if outcome.fault] == []


def test_every_feature_occurs() -> None:
    seen: Counter[str] = Counter()
    for seed in range(MODELS):
        seen.update(model(seed).features)
    assert {
        feature: seen[feature] for feature in {*seen, *OPERATIONS} if seen[feature] < OFTEN
    } == {}


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_gives_one_model(seed: int) -> None:
    one, two = model(seed), model(seed)
    assert str(one) == str(two)
    for k in range(one.calls):
        losses, again = one.step(k), two.step(k)
        torch.rand(1)
        assert all(torch.equal(loss, again[task]) for task, loss in losses.items())


def test_the_check_sees_wrong_rows_and_refusals_out_of_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {o.kind for o in outcomes(model(PLAIN))} == {RIGHT}
    gram = mtu.Rows.gram
    with monkeypatch.context() as patch:
        patch.setattr(mtu.Rows, "gram", lambda self: gram(self) * (1 + 1e-8))
        assert {o.kind for o in outcomes(model(PLAIN))} == {WRONG}

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("a hook on somebody else")

    monkeypatch.setattr(mtu.Engine, "rows", refuse)
    assert {o.kind for o in outcomes(model(PLAIN))} == {UNSTATED}


def test_the_check_wants_a_hook_on_a_parameter_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = model(HOOKED)
    assert PARAMETER in m.features and m.hooked is not None
    text = f"a hook on {m.hooked[0]}"

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    with monkeypatch.context() as patch:
        patch.setattr(mtu.Engine, "rows", refuse)
        assert {o.kind for o in outcomes(m)} == {REFUSED}
        text = "a hook on another"
        assert {o.kind for o in outcomes(model(HOOKED))} == {UNSTATED}
    monkeypatch.setattr(taking, "_check_hooks", lambda *_: None)
    assert ACCEPTED in {o.kind for o in outcomes(model(HOOKED))}
