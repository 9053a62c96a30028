"""The table of waits, and the comparison of a captured step, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import capture, waits
from benchmarks.models import build

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    waits.main(["--models", "mlp", "--tasks", "1", "3", "--repeats", "2"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[3].strip() for row in rows] == ["0", "0"]


def test_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        waits.main(["--repeats", "0"])
    assert "numbers from 1" in capsys.readouterr().err


def test_steps_are_equal_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert capture.main(["--quick", "--models", "mlp", "--tasks", "1"]) == 0
    assert "ops on every batch, and no wait" in capsys.readouterr().out


def test_steps_that_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def growing(case: waits.Case) -> capture.Step:
        step, calls = step_of(case), [0]

        def grown() -> capture.mtu.Update:
            calls[0] += 1
            for _ in range(calls[0]):
                case.inputs.sum()
            return step()

        return grown

    step_of = capture.step_of
    monkeypatch.setattr(capture, "step_of", growing)
    assert capture.main(["--quick", "--models", "mlp", "--tasks", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_step_that_waits_is_refused() -> None:
    case = build("mlp", 1, quick=True)
    with waits.behind(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(waits._later, "BEHIND", set())
        step = capture.step_of(case)
        for _ in range(waits.BEFORE):
            case.model.zero_grad()
            step()
        case.model.zero_grad()
        assert waits.recorded(step).waits


def test_a_launch_is_what_writes() -> None:
    x = torch.ones(2, 3)
    several, others = [x, x.clone()], [torch.zeros(2, 3), torch.zeros(2, 3)]

    def launches(call: Callable[[], object]) -> int:
        return waits.recorded(call).launches

    assert launches(lambda: x + x) == launches(lambda: x.add_(x)) == launches(x.zero_) == 1
    # of many tensors: one, although nothing is given back
    assert launches(lambda: torch._foreach_copy_(several, others)) == 1
    assert launches(lambda: torch._foreach_mul(several, 2.0)) == 1
    for free in (lambda: x.T, lambda: x.split(1), lambda: torch.empty(3), lambda: x.new_empty(2)):
        assert launches(free) == 0
