"""Errors that write down what bound they were held to, so that a table of them can be checked, and made anew."""

from __future__ import annotations

import json
import os
from pathlib import Path

FILE = "MTU_FAST_ERRORS"  # a file to add to, one line an error
HELD: list[tuple[float, float]] = []  # (error, bound) of the test that is running, in this process


class Measured(float):
    """An error: `error <= bound` is noted."""

    def __le__(self, bound: float) -> bool:
        HELD.append((float(self), float(bound)))
        into, test = os.environ.get(FILE), os.environ.get("PYTEST_CURRENT_TEST", "")
        if into and test.endswith("(call)"):
            line = {"test": test.partition("[")[0].removesuffix(" (call)"), "error": float(self)}
            with Path(into).open("a") as file:
                file.write(json.dumps(line | {"bound": float(bound)}) + "\n")
        return float(self) <= bound
