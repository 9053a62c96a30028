"""What an audit found, as JSON and as a page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtu_fast._arguments import check_text
from mtu_fast._checks.files import check_folder
from mtu_fast.unlearning.report.page import page

SCHEMA, VERSION = "mtu_fast.audit", 1
KEYS = (
    "title", "models", "request", "scores", "membership", "drift", "histograms", "loss_levels",
    "mean_losses", "distances", "relearn", "parameter_shift", "cosines", "cost", "history",
    "notes", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        data: every number and word of the report as plain lists, dictionaries, strings and finite
            numbers or None: request, scores, uis, gaps, tow, over_forgotten, membership, drift,
            histograms, loss_levels, mean_losses,
            distances, relearn, parameter_shift, cosines, cost, history, notes and
            verdict.
    """

    data: dict[str, Any]

    def __repr__(self) -> str:
        return f"Audit({self.data['title']!r}: {self.data['verdict']['headline']})"

    def to_json(self, path: str | Path) -> None:
        """Write `data`; `from_json` reads it back.

        Raises:
            TypeError: no path.
            FileNotFoundError: there is no such folder.
        """
        check_folder("path", path)
        Path(path).write_text(
            json.dumps(self.data, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def from_json(cls, path: str | Path) -> Audit:
        """The audit that `to_json` wrote.

        Raises:
            TypeError: no path.
            ValueError: no JSON, another schema or a later version of it, or a part is missing.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path: found {path!r}, expected the path of a file.")
        if "\0" in str(path):
            raise ValueError(f"path: found {str(path)!r}, expected a name without NUL characters.")
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is no JSON of an audit: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path}: found {type(data).__name__}, expected the JSON of an audit.")
        if data.get("schema") != SCHEMA or data.get("version") != VERSION:
            found = f"{data.get('schema')!r} version {data.get('version')!r}"
            raise ValueError(
                f"{path}: found schema {found}, expected {SCHEMA!r} version {VERSION}."
            )
        missing = [key for key in KEYS if key not in data]
        if missing:
            raise ValueError(f"{path}: is incomplete: it holds no {', '.join(missing)}.")
        return cls(data)

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page: no script, nothing loaded from elsewhere.

        Raises:
            TypeError: no path.
            FileNotFoundError: there is no such folder.
        """
        write_html(path, [self])


def write_html(path: str | Path, audits: Sequence[Audit], title: str | None = None) -> None:
    """Write several audits, for example of several requests, as one self-contained page.

    Raises:
        TypeError: something else than audits, or no path.
        ValueError: no audit.
        FileNotFoundError: there is no such folder.
    """
    if not isinstance(audits, Sequence) or not all(isinstance(one, Audit) for one in audits):
        raise TypeError(f"write_html: found {audits!r:.60}, expected a list of audits.")
    if not audits:
        raise ValueError("write_html: found no audit, expected at least one.")
    if title is not None:
        check_text(title=title)
    check_folder("path", path)
    Path(path).write_text(page([each.data for each in audits], title), encoding="utf-8")
