"""What tests of plans share."""

from __future__ import annotations

from typing import Any

import pytest

from mtu_fast._graph import plans


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every check."""
    found: list[int] = []
    plain = plans.Check

    def counted(*args: Any, **named: Any) -> Any:
        found.append(len(found))
        return plain(*args, **named)

    monkeypatch.setattr(plans, "Check", counted)
    return found
