"""A progress bar where tqdm is installed, and none where it is not."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from mtu_fast.unlearning.loop.run import Run


class Progress:
    """Steps made, and the scores of the last evaluation.

    Args:
        run: what is shown.
        shown: whether to show anything.
    """

    def __init__(self, run: Run, shown: bool) -> None:
        self.run, self._seen = run, 0
        self._bar: Any = None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            total = run.settings.max_steps
            self._bar = tqdm(
                total=total, initial=run.step, desc="unlearn", unit="step", dynamic_ncols=True
            )

    def update(self) -> None:
        """Draw what is new."""
        if self._bar is None:
            return
        self._bar.update(self.run.step - self._bar.n)
        records = self.run.history.records
        if len(records) != self._seen:
            self._seen, last = len(records), records[-1]
            scores = [("forget", last.forget), ("retain", last.retain)]
            parts = [f"{side} {sum(one.values()) / len(one):.3g}" for side, one in scores if one]
            self._bar.set_postfix_str(", ".join(parts))

    def __enter__(self) -> Progress:
        self.update()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
