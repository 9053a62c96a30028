"""The phases are those of a step, one after the other, and each names what it spent its time on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

import mtu_fast as mtu
from benchmarks import phases
from benchmarks.models import build
from benchmarks.peers.ways import ours
from tests.helpers.truth import relative_error

T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_walk_is_a_step() -> None:
    case = build("transformer", 3, quick=True)
    engine = mtu.Engine(case.model, params=case.params.values())
    seen: dict[str, Any] = {}

    def watch(name: str, call: Callable[[], T]) -> T:
        seen[name] = result = call()
        return result

    phases.walk(case, engine, watch)
    assert tuple(seen) == phases.PHASES
    mine = build("transformer", 3, quick=True)
    ours(mine).step()
    for name, p in case.params.items():
        assert relative_error(seen["combine"][p], mine.params[name].grad) <= 1e-5


def test_phases_and_their_ops(capsys: pytest.CaptureFixture[str]) -> None:
    plain, found = phases.phases(build("mlp", 1, quick=True), repeats=2)
    assert plain > 0 and [phase.name for phase in found] == list(phases.PHASES)
    ops = {phase.name: {name for name, _, _ in phase.ops} for phase in found}
    assert "aten::addmm" in ops["forward"] and "aten::mm" in ops["combine"]
    assert any("gram" in name for name in ops["gram"])
    for phase in found:
        assert phase.ratio > 0 and phase.ops == sorted(phase.ops, key=lambda op: -op[1])
    phases.main(["--quick", "--models", "mlp", "--tasks", "1", "--repeats", "1", "--ops", "2"])
    assert "plain step" in (printed := capsys.readouterr().out) and printed.count(
        " ms x"
    ) == 2 * len(phases.PHASES)


@pytest.mark.parametrize("argument", [["--repeats", "0"], ["--tasks", "0"], ["--ops", "-1"]])
def test_numbers_that_are_none(argument: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        phases.main([*argument, "--quick"])
    assert "numbers from 1" in capsys.readouterr().err
