"""What a test of the page's table holds its errors to is what the page says."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from benchmarks.integrations_page import EXACT, NOTHING, PAGE, Line, table
from tests.helpers.measured import FILE, HELD
from tests.integrations.ranks import forget_the_parent

SLACK = 10  # of another CPU's rounding
LINES: dict[str, list[Line]] = {}
for _line in table(PAGE.read_text()):
    LINES.setdefault(_line.node, []).append(_line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """After the test: bounds and errors are those of the page."""
    HELD.clear()
    outcome = yield
    # unless they are measured anew
    if FILE not in os.environ:
        check(LINES.get(item.nodeid.partition("[")[0], []), list(HELD))
    return outcome


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Accelerate keeps one state a process."""
    forget_the_parent()
    yield
    forget_the_parent()


def check(lines: list[Line], held: list[tuple[float, float]]) -> None:
    """Errors of one test against its lines."""
    shown = {
        float(line.allowed): float(line.error)
        for line in lines
        if line.allowed not in (NOTHING, EXACT)
    }
    if not shown:
        return
    assert held, f"{lines[0].test}: found no error held to a bound, expected one as the page says"
    for error, bound in held:
        assert bound in shown, f"{lines[0].test}: found the bound {bound}, the page says {shown}"
        # a bound is far above some errors, and would hide that they grew
        most = max(SLACK * shown[bound], bound / SLACK)
        assert error <= most, f"{lines[0].test}: found {error}, the page says {shown[bound]}"
