"""A progress bar in a terminal or notebook where tqdm is installed, a line now and then in pipes and logs."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol

from mtu_fast.unlearning.loop.run import Run

PAUSE = 30.0  # seconds between two lines of a log


class Shown(Protocol):
    """What shows how far a run has come."""

    def update(self, run: Run) -> None:
        """Show what is new."""

    def close(self, run: Run) -> None:
        """Show the end."""


class Bar:
    """tqdm's, redrawn in place.

    Args:
        tqdm: the class.
        run: what is shown.
    """

    def __init__(self, tqdm: Any, run: Run) -> None:
        self._seen = 0
        self._bar = tqdm(
            total=run.settings.max_steps,
            initial=run.step,
            desc="unlearn",
            unit="step",
            dynamic_ncols=True,
        )

    def update(self, run: Run) -> None:
        """Draw what is new."""
        self._bar.update(run.step - self._bar.n)
        records = len(run.history.records)
        if records != self._seen:
            self._seen = records
            self._bar.set_postfix_str(scores(run))

    def close(self, run: Run) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class Lines:
    """A line on stderr every half minute, and one at the end."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def update(self, run: Run) -> None:
        """A line, if the last one is long ago."""
        now = time.monotonic()
        if now - self._last >= PAUSE:
            self._last = now
            self._write(run)

    def close(self, run: Run) -> None:
        """The last line."""
        self._write(run)

    def _write(self, run: Run) -> None:
        of = "" if run.settings.max_steps is None else f"/{run.settings.max_steps}"
        parts = [f"unlearn: step {run.step}{of}", scores(run), run.history.reason]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def scores(run: Run) -> str:
    """The mean scores of the last evaluation."""
    if not run.history.records:
        return ""
    last = run.history.records[-1]
    found = []
    for side, by_task in (("forget", last.forget), ("retain", last.retain)):
        if by_task:
            found.append(f"{side} {sum(by_task.values()) / len(by_task):.3g}")
    return ", ".join(found)


def shown_by(run: Run) -> Shown:
    """A bar where it can be redrawn; lines in pipes and logs, and without tqdm."""
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return Lines()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return Lines()
    return Bar(tqdm, run)


class Progress:
    """Steps made, and the scores of the last evaluation.

    Args:
        run: what is shown.
        shown: whether to show anything.
    """

    def __init__(self, run: Run, shown: bool) -> None:
        self.run = run
        self._shown = shown_by(run) if shown else None

    def update(self) -> None:
        """Show what is new."""
        if self._shown is not None:
            self._shown.update(self.run)

    def __enter__(self) -> Progress:
        self.update()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown is not None:
            self._shown.close(self.run)
