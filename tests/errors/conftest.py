"""What tests of this folder are given."""

from __future__ import annotations

import pytest

from tests.errors.bench import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()
