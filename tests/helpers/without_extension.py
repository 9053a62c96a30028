"""A pytest plugin: `-p tests.helpers.without_extension` runs the tests as if `mtu_fast._C` had not been built."""

from __future__ import annotations

import sys
from typing import Any, cast

modules = cast(dict[str, Any], sys.modules)
modules["mtu_fast._C"] = None  # importing it then fails


def pytest_report_header() -> str:
    """What is tested, in the first lines of the run."""
    from mtu_fast._ops import _library

    assert _library.EXTENSION is None
    return f"without the extension: {_library.MISSING}"
