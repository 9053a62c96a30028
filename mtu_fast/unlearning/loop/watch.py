"""What is looked at between steps, and whether it ends the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mtu_fast._checks.masks import targeted
from mtu_fast._checks.warned import warn
from mtu_fast._distributed.crew import Crew
from mtu_fast.unlearning.arguments import check_names
from mtu_fast.unlearning.loaders import length_of
from mtu_fast.unlearning.loop.evaluate import Measured, measure
from mtu_fast.unlearning.loop.history import History, Record
from mtu_fast.unlearning.loop.schedule import Scheduled
from mtu_fast.unlearning.loop.settings import Settings

Look = tuple[Measured, Measured]  # of the data to forget, of the retained data


class Watch:
    """Evaluations of the model of a run, over all of its ranks."""

    def __init__(self, settings: Settings, crew: Crew) -> None:
        self.settings = settings
        self._crew = crew
        self._samples: dict[str, int] = {}

    def look(self) -> Look:
        """Losses and scores on the data to forget, and on the retained data that is monitored."""
        s = self.settings
        forget = self._on("forget", s.forget)
        if s.monitor is None:
            return forget, self._on("retain", s.retain)
        return forget, self._on("monitor", s.monitor)

    def validation(self) -> Measured:
        """Losses and scores on data never seen."""
        held_out = self.settings.validation
        return self._on("validation", () if held_out is None else held_out)

    def _on(self, name: str, loader: Iterable[Any]) -> Measured:
        s = self.settings
        found = measure(name, s.model, loader, s.losses, s.score, s.generators, self._crew)
        # the first evaluation says how many there are
        before = self._samples.setdefault(name, found.samples)
        if found.samples != before:
            warn(
                f"{name}: this evaluation saw {found.samples} samples, an earlier one {before}; their means are not of "
                "the same data. Does the loader end early?",
            )
        return found

    def begin(self, look: Look) -> History:
        """An empty history, with targets and held-out level.

        Raises:
            TypeError: targets are one string.
            ValueError: unknown targets, or losses or scores that nothing can be measured by.
        """
        forget, retain = look
        _finite_losses("forget", forget)
        _finite_losses("retain", retain)
        # a task may have labels on one side only
        tasks = tuple(dict.fromkeys((*forget.tasks, *retain.tasks)))
        check_names(tasks)
        targets = targeted(self.settings.targets, tasks)
        self._check_drift(tasks)
        _finite_scores("forget", forget, targets)
        return History(tasks, targets, self._level(targets))

    def _check_drift(self, tasks: Sequence[str]) -> None:
        bound = self.settings.max_drift
        if not isinstance(bound, Mapping):
            return
        unknown = [name for name in bound if name not in tasks]
        if unknown:
            raise ValueError(
                f"max_drift: found unknown tasks {unknown}, expected some of {list(tasks)}."
            )

    def _level(self, targets: Sequence[str]) -> dict[str, float] | None:
        """The scores on data never seen; None without such data."""
        if self.settings.validation is None:
            return None
        held_out = self.validation()
        _finite_scores("validation", held_out, targets)
        levels = self.settings.levels
        # those measured before may be of an earlier model, the true original: they stay
        if levels is not None and not levels.measured:
            levels.take(held_out)
        return {task: held_out.score[task] for task in targets}

    def sizes(self, look: Look) -> dict[str, int | None]:
        """Samples and batches of both sides; None where a loader that was not read does not know."""
        forget, retain = look
        samples: int | None = retain.samples
        batches: int | None = retain.batches
        if self.settings.monitor is not None:  # then `retain` itself was not read
            samples = length_of(getattr(self.settings.retain, "dataset", None))
            batches = length_of(self.settings.retain)
        return {
            "forget": forget.samples,
            "forget_batches": forget.batches,
            "retain": samples,
            "retain_batches": batches,
        }

    def undefined(self, history: History, look: Look) -> str:
        """What of an evaluation is not finite and decides on the run; "" for nothing."""
        for side, found in zip(("forget", "retain"), look, strict=True):
            bad = unbounded(found)
            if bad:
                return f"the mean {side} loss of {bad}"
        bad = unscored(look[0], history.level or ())
        if bad:
            return f"the forget score of {bad}"
        return ""

    def record(self, history: History, look: Look, step: int, seconds: float) -> Record:
        """The evaluation as a line of the history."""
        forget, retain = look
        rise = dict.fromkeys(retain.loss, 0.0)
        if history.records:
            rise = _rise(history, look)
        found = Record(step, forget.score, retain.score, forget.loss, retain.loss, rise, seconds)
        if self.settings.settle is None or not (history.is_down(found) or not history.records):
            return found
        return replace(found, validation=self.validation().score)

    def verdict(self, history: History, end: str) -> str:
        """What ends the run with the last record: "drift", "level", the `end` that it is anyway, or "" for nothing."""
        record, method, settle = history.records[-1], self.settings.method, self.settings.settle
        for task, rise in record.drift.items():
            if rise > self.settings.drift_bound(task):
                return "drift"
        # a schedule that knows its number of epochs is not cut short
        own_end = isinstance(method, Scheduled) and method.epochs is not None
        begun = history.reached
        if begun is None or own_end:
            return end
        # a run that settles has been at the level, and its model is of that time
        return "level" if end or record.step >= begun + (settle or 0) else ""


def _rise(history: History, look: Look) -> dict[str, float]:
    """{task: rise of the mean loss since the first record} of what is retained; see `Record.drift`."""
    forget, retain = look
    before = history.records[0]
    found = {}
    for task, loss in retain.loss.items():
        found[task] = loss - before.retain_loss[task]
    # a task that is no target is to stay on the forget samples, too: the worse of both counts
    for task in forget.loss.keys() - set(history.targets):
        there = forget.loss[task] - before.forget_loss[task]
        found[task] = max(found.get(task, -math.inf), there)
    return found


def unbounded(found: Measured) -> list[str]:
    """Tasks whose mean loss is not finite."""
    return [task for task, loss in found.loss.items() if not math.isfinite(loss)]


def _finite_losses(name: str, found: Measured) -> None:
    bad = unbounded(found)
    if bad:
        raise ValueError(
            f"{name}: the mean loss of tasks {bad} is not finite before the first step already. Where labels "
            "are missing, losses(model, batch) must return (losses, {task: [N] bool}), True where one is there."
        )


def unscored(found: Measured, targets: Iterable[str]) -> list[str]:
    """Tasks among `targets` without a finite score."""
    return [task for task in targets if not math.isfinite(found.score.get(task, math.nan))]


def _finite_scores(name: str, found: Measured, targets: Sequence[str]) -> None:
    bad = unscored(found, targets)
    if bad:
        raise ValueError(
            f"{name}: found no finite score of the target tasks {bad}, only {found.score}; are there samples with a "
            "label for them, and does score(model, loader) return {task: float} for every target?"
        )


def known(sizes: Mapping[str, int | None]) -> dict[str, int]:
    """The sizes as `Scheduled.prepare` wants them.

    Raises:
        ValueError: one is not known.
    """
    found = {name: size for name, size in sizes.items() if size is not None}
    if len(found) < len(sizes):
        raise ValueError(
            "retain: the schedule of the method needs the number of samples and batches, and this loader does not know "
            "them; pass a DataLoader with a length, or leave monitor out."
        )
    return found
