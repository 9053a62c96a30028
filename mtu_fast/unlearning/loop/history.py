"""What happened in a run: one record per evaluation, why it stopped, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mtu_fast._checks.files import check_folder

REASONS = {
    "level": "the forget scores fell to the held-out level",
    "drift": "the retained data drifted over the bound; the model is that of the last evaluation kept within it",
    "max_steps": "all steps were made",
    "epochs": "all epochs were made",
    "not finite": "a loss or gradient was not finite; the model is that of the last evaluation kept",
}


@dataclass(frozen=True)
class Record:
    """One evaluation.

    Attributes:
        step: optimizer steps made before it.
        forget: {task: score} on the data to forget.
        retain: {task: score} on the retained data.
        forget_loss: {task: mean loss} on the data to forget.
        retain_loss: {task: mean loss} on the retained data.
        drift: {task: rise of the mean loss of what is retained}; in the partial case the worse of
            the retained data and the forget samples, for tasks that are no target.
        seconds: spent in steps so far, evaluations not counted.
        validation: {task: score} on data never seen, of the original and at the level, of a run
            that settles; else empty.
    """

    step: int
    forget: dict[str, float]
    retain: dict[str, float]
    forget_loss: dict[str, float]
    retain_loss: dict[str, float]
    drift: dict[str, float]
    seconds: float
    validation: dict[str, float] = field(default_factory=dict)


@dataclass
class History:
    """A run of `unlearn`.

    Attributes:
        tasks: all tasks.
        targets: those to forget.
        level: {target: score of the original on validation data}; None without validation data.
        records: one per evaluation, the original first.
        reason: why it stopped: "level", "drift", "max_steps", "epochs" or "not finite"; "" while it
            runs.
        step: the step whose parameters the model has; of a run that settled or drifted it may be
            before that of the last record.
    """

    tasks: tuple[str, ...]
    targets: tuple[str, ...]
    level: dict[str, float] | None = None
    records: list[Record] = field(default_factory=list)
    reason: str = ""
    step: int = 0

    @property
    def reached(self) -> int | None:
        """The step of the first evaluation at which every target was at its level; None if there was none."""
        return next((record.step for record in self.records if self.is_down(record)), None)

    def is_down(self, record: Record) -> bool:
        """Whether every target is at its level in an evaluation: a mean would hide one that is not forgotten."""
        level = self.level
        return level is not None and all(record.forget[task] <= level[task] for task in level)

    @property
    def explanation(self) -> str:
        """The reason in words."""
        said, reached = REASONS.get(self.reason, "it has not stopped"), self.reached
        if self.reason == "max_steps" and self.level is not None and reached is None:
            return f"{said}, and not every target was down to the held-out level"
        if self.reason != "level" or reached is None:
            return said
        if reached == 0:
            said = "the forget scores were at the held-out level before the first step"
        # a run that settled
        if self.records[-1].step > reached:
            said += f", first at step {reached}; the model is that of step {self.step}"
        return said

    def to_json(self, path: str | Path) -> None:
        """Write everything as JSON.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        check_folder("path", path)
        found = self.to_dict() | {"explanation": self.explanation}
        Path(path).write_text(json.dumps(found, indent=1))

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries, lists, strings and numbers."""
        return asdict(self) | {"tasks": list(self.tasks), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> History:
        """What `to_dict` gave."""
        records = [Record(**record) for record in stored["records"]]
        tasks, targets = tuple(stored["tasks"]), tuple(stored["targets"])
        return cls(tasks, targets, stored["level"], records, stored["reason"], stored["step"])

    def plot(self, path: str | Path | None = None) -> Any:
        """Scores on forget and retain over the steps, one panel per task, the held-out level dashed.

        Args:
            path: where to save it; the ending says the format. None: nowhere.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            FileNotFoundError: there is no such folder.
        """
        if path is not None:
            check_folder("path", path)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "History.plot needs matplotlib: pip install 'mtu_fast[demo]'"
            ) from error
        figure = Figure(figsize=(3.2 * len(self.tasks), 2.8), layout="constrained")
        panels = figure.subplots(1, len(self.tasks), squeeze=False)[0]
        for task, axes in zip(self.tasks, panels, strict=True):
            self._plot_task(task, axes)
        panels[0].legend()
        if path is not None:
            figure.savefig(path)
        return figure

    def _plot_task(self, task: str, axes: Any) -> None:
        for side in ("forget", "retain"):
            steps, scores = self._course(side, task)
            axes.plot(steps, scores, marker=".", label=side)
        if self.level and task in self.level:
            axes.axhline(self.level[task], color="grey", linestyle="--", label="held out")
        axes.axvline(self.step, color="lightgrey", zorder=0, label="this model")
        title = f"{task} (target)" if task in self.targets else task
        axes.set(title=title, xlabel="step", ylabel="score")

    def _course(self, side: str, task: str) -> tuple[list[int], list[float]]:
        """Steps of the evaluations, and a task's scores there."""
        steps, scores = [], []
        for record in self.records:
            of_side = getattr(record, side)
            if task in of_side:
                steps.append(record.step)
                scores.append(of_side[task])
        return steps, scores

    def __repr__(self) -> str:
        return f"History({self.reason or 'running'} at step {self.step}: {self.explanation})"
