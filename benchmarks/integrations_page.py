"""The errors in the table of docs/integrations.md, found anew by running its tests.

    python -m benchmarks.integrations_page

Runs every test that a line of the table names, takes the largest error that it held to the line's bound
(`tests/helpers/measured.py`), and writes it into the line. A line whose test held nothing to that bound is
an error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "integrations.md"
NOTHING, EXACT = "–", "0"
FILE = "MTU_FAST_ERRORS"


class Line(NamedTuple):
    """A line of the table, by its cells."""

    expectation: str
    loop: str
    works: str
    lines: str
    error: str
    allowed: str
    test: str

    @property
    def is_measured(self) -> bool:
        """Whether a test holds an error to a bound; otherwise it says yes or no, or asks for equal bits."""
        return self.allowed not in (NOTHING, EXACT)

    @property
    def node(self) -> str:
        """Of the test, from the root."""
        return "tests/" + self.test.strip("`")

    @property
    def text(self) -> str:
        """As it stands on the page."""
        return f"| {' | '.join(self)} |"


def is_line(text: str) -> bool:
    """Whether this is a line of the table."""
    return text.startswith("| ") and "::" in text


def line_of(text: str) -> Line:
    """A line of the table."""
    return Line(*(cell.strip() for cell in text.strip("|").split("|")))


def table(page: str) -> list[Line]:
    """All lines of the table."""
    return [line_of(text) for text in page.splitlines() if is_line(text)]


def measured(nodes: Sequence[str]) -> dict[tuple[str, float], float]:
    """{(test, bound): the largest error that was held to it}."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "errors"
        into.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *sorted(set(nodes))]
        subprocess.run(command, cwd=ROOT, env=os.environ | {FILE: str(into)}, check=True)
        found: dict[tuple[str, float], float] = {}
        for each in map(json.loads, into.read_text().splitlines()):
            key = each["test"], each["bound"]
            found[key] = max(found.get(key, 0.0), each["error"])
    return found


def rewritten(page: str, errors: dict[tuple[str, float], float]) -> str:
    """The page with these errors in its table.

    Raises:
        ValueError: a line whose test held nothing to its bound.
    """
    texts = page.split("\n")
    for number, text in enumerate(texts):
        if not is_line(text) or not line_of(text).is_measured:
            continue
        line = line_of(text)
        key = line.node, float(line.allowed)
        if key not in errors:
            raise ValueError(f"{line.node}: found no error held to {line.allowed}.")
        texts[number] = line._replace(error=f"{errors[key]:.1e}").text
    return "\n".join(texts)


def main() -> None:
    """Measure, and write the page."""
    page = PAGE.read_text()
    nodes = [line.node for line in table(page) if line.is_measured]
    PAGE.write_text(rewritten(page, measured(nodes)))
    print(f"{PAGE.name}: {len(nodes)} errors")


if __name__ == "__main__":
    main()
