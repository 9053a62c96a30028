"""What a test in other people's loops runs under: one thread, and without what their packages warn of."""

from __future__ import annotations

import pytest

SAID = ("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory:UserWarning")


def marks(*more: str) -> list[pytest.MarkDecorator]:
    """The marks of a module of tests; `more` are filters of warnings."""
    filters = [pytest.mark.filterwarnings(each) for each in (*SAID, *more)]
    return [pytest.mark.usefixtures("one_thread"), *filters]
