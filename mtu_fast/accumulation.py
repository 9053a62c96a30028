"""Rows of micro-batches, held until the step that solves over all of them."""

from __future__ import annotations

from collections.abc import Sequence

from mtu_fast._distributed.ranks import Ranks, attempt
from mtu_fast._rows.means import Means
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast.rows import Rows, cat


class Accumulation:
    """The rows since the last step: rows per sample side by side, rows per task as their means.

    Attributes:
        per: "sample" or "task"; None where nothing is held.
    """

    def __init__(self) -> None:
        self.per: str | None = None
        self._shared: Shared | None = None
        self._samples: list[Rows] = []
        self._means: Means | None = None
        self._ranks: Ranks | None = None  # whose mean rows are held
        self._last: Sequence[TaskRows] = []  # what names the tasks where no sample gives a row

    def __reduce__(self) -> tuple[type[Accumulation], tuple[()]]:
        return Accumulation, ()  # rows belong to the parameters they were taken from

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return self.per is None

    def check(self, per: str, shared: Shared, sync: bool, ranks: Ranks | None) -> None:
        """Rows of this kind can be joined to those held, and all ranks take the same step.

        Raises:
            ValueError: they are of another kind, or of other parameters; or ranks differ, or one may
                leave alone.
        """
        if ranks is None:
            self._check_kind(per, shared)
            return
        # before the first exchange: a rank that has left would not answer it
        ranks.check_step()
        # what one rank finds all raise, before they take rows
        kind = attempt(lambda: self._check_kind(per, shared))
        told = ranks.told("accumulate", kind.error, [sync, per == "task"])
        for name, given in zip(("sync", "rows per task"), zip(*told, strict=True), strict=True):
            if len(set(given)) > 1:
                raise ValueError(
                    f"accumulate: {name}: found {[*map(bool, given)]} on the ranks, expected the same on all: every "
                    "rank takes as many micro-batches. Fill up or drop the last ones (DistributedSampler; Accelerate's "
                    "even_batches=True); a rank without samples gives losses of length 0."
                )

    def _check_kind(self, per: str, shared: Shared) -> None:
        """Rows of this kind can be joined to those held.

        Raises:
            ValueError: they are of another kind, or of other parameters.
        """
        if self.per is None:
            return
        if self.per != per:
            raise ValueError(
                f"accumulate: found a method of rows per {per} after one of rows per {self.per}, expected one method "
                "for all micro-batches of a step; call engine.discard() to start anew."
            )
        if self._shared is not shared:
            raise ValueError(
                "accumulate: found other trainable parameters than for the micro-batches before, expected the same "
                "until sync=True; call engine.discard() to start anew."
            )

    def add_samples(self, rows: Rows, shared: Shared) -> None:
        """Take in the rows of a micro-batch, one per sample."""
        self._check_kind("sample", shared)
        self._samples.append(rows)
        self.per, self._shared = "sample", shared

    def add_means(self, parts: Sequence[TaskRows], shared: Shared, ranks: Ranks | None) -> None:
        """Take in the mean rows of a micro-batch; on an error, what was held before stays as it was.

        Raises:
            ValueError: rows that do not go with those held.
            RuntimeError: parameters changed since the first micro-batch.
        """
        self._check_kind("task", shared)
        # every rank has its part of the same rows, so what one finds all are told
        self._means = (
            self._with(parts, shared)
            if ranks is None
            else ranks.agreed("accumulate", lambda: self._with(parts, shared))
        )
        self.per, self._shared, self._ranks, self._last = "task", shared, ranks, parts

    def _with(self, parts: Sequence[TaskRows], shared: Shared) -> Means:
        """The means of what is held and of these."""
        # a copy: what is held stays as it was if a part does not fit
        means = Means(shared) if self._means is None else self._means.copy()
        for part in parts:
            if part.is_mean:
                means.add(part)
        return means

    def take(self) -> Rows:
        """All rows that are held; nothing is, afterwards.

        Raises:
            RuntimeError: nothing is held, or parameters changed since the first micro-batch.
        """
        try:
            rows = self._joined()
        finally:
            self.clear()
        if rows is None:
            raise RuntimeError("accumulate: found no rows, expected those of one micro-batch.")
        return rows

    def clear(self) -> None:
        """Let go of everything."""
        self.per, self._shared, self._samples, self._means = None, None, [], None
        self._ranks, self._last = None, []

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        rows = self._joined()
        return 0 if rows is None else rows.nbytes

    def _joined(self) -> Rows | None:
        if self._samples:
            return cat(*self._samples)
        if self._means is None or self._shared is None:
            return None
        return Rows(self._shared, self._means.parts() or self._last, self._ranks)
