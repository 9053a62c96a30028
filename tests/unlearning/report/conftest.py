"""What tests of this folder are given."""

from __future__ import annotations

import pytest

import mtu_fast as mtu
from tests.unlearning.report.setting import audit


@pytest.fixture(scope="module")
def full() -> mtu.Audit:
    return audit()
