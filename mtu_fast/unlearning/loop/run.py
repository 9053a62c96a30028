"""One run: begun or resumed, then a step at a time until it is over."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mtu_fast._distributed.crew import Crew
from mtu_fast.engine import Engine
from mtu_fast.errors import NotFiniteError
from mtu_fast.unlearning.loop.crews import check_loaders
from mtu_fast.unlearning.loop.epochs import Epochs
from mtu_fast.unlearning.loop.history import History
from mtu_fast.unlearning.loop.overlap import check_data, check_share
from mtu_fast.unlearning.loop.resuming import Saved
from mtu_fast.unlearning.loop.settings import Settings
from mtu_fast.unlearning.loop.settling import falling, is_nearest, rest_of
from mtu_fast.unlearning.loop.shared_levels import held_by_all
from mtu_fast.unlearning.loop.state import clear_gradients, mark, put_back
from mtu_fast.unlearning.loop.step import Step
from mtu_fast.unlearning.loop.watch import Look, Watch, known

FINAL = ("level", "drift")  # reasons that hold whatever limits a later call sets


class DivergedError(RuntimeError):
    """A loss or gradient was not finite; the model is that of the last evaluation kept, `history` says how it came."""

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history


class Run:
    """A run of `unlearn`, begun or resumed when it is made.

    Args:
        settings: what was asked for.
        engine: of the model.
        crew: the ranks of the engine.

    Attributes:
        settings: what was asked for.
        history: what happened; its `reason` is set when the run is over.
        step: optimizer steps made.
        good: the state of all that steps change at the last evaluation within all bounds; of a run
            that settles, at the nearest one.
    """

    def __init__(self, settings: Settings, engine: Engine, crew: Crew) -> None:
        self.settings = settings
        self.crew = crew
        self.watch = Watch(settings, crew)
        crew.agreed(
            "unlearn", lambda: check_data(settings.forget, settings.retain, settings.validation)
        )
        check_loaders(crew, settings)
        self.epochs = Epochs(settings, lambda: self.watch.validation().loss)
        self.saved = Saved(settings, engine, crew, self.epochs.forget, self.epochs.retain)
        self.step = 0
        self.seconds = 0.0
        self.good: dict[str, Any] = {}
        path = settings.checkpoint
        # the first rank looks: others may see another file system
        if path is not None and crew.first("unlearn: checkpoint", Path(path).exists):
            self._resume(path)
        else:
            self._begin()
        self._steps = Step(settings, engine, crew, self.history.targets)

    def undo(self) -> None:
        """Leave no trace of the steps since the evaluation of the good state."""
        put_back(self.settings, self.good)
        clear_gradients(self.settings)

    def advance(self) -> None:
        """One step, and an evaluation where one is due; sets `history.reason` at the end.

        Raises:
            DivergedError: something is not finite.
        """
        start = time.perf_counter()
        batches = self.epochs.batches()
        if batches is None:
            self._evaluate("epochs", self.watch.look())
            return
        try:
            self._steps.make(*batches, self._rate())
        except NotFiniteError as error:
            raise self._diverged(f"in step {self.step + 1}, {error}") from error
        self.step += 1
        self.seconds += max(0.0, time.perf_counter() - start)  # a clock may jump
        if self._all_steps_made():
            self._evaluate("max_steps", self.watch.look())
        elif self.step % self.settings.every == 0 or self.step == self._rest():
            self._evaluate("", self.watch.look())

    def _rate(self) -> float:
        begun, rest = self.history.reached, self._rest()
        return 1.0 if begun is None or rest is None else falling(self.step, begun, rest)

    def _rest(self) -> int | None:
        return rest_of(self.history, self.settings.settle, self.settings.max_steps)

    def _all_steps_made(self) -> bool:
        limit = self.settings.max_steps
        return limit is not None and self.step >= limit

    # ---- between steps ---------------------------------------------------------------------------

    def _evaluate(self, end: str, look: Look) -> None:
        """Record what was seen; decide whether this is the end; keep what is good."""
        undefined = self.watch.undefined(self.history, look)
        if undefined:
            raise self._diverged(f"after step {self.step}, {undefined} is not finite.")
        history = self.history
        # clocks differ, and the ranks' histories must not
        seconds = self.crew.objects("unlearn: evaluation", self.seconds)[0]
        # an epoch may end where an evaluation was just made
        if not history.records or history.records[-1].step != self.step:
            history.records.append(self.watch.record(history, look, self.step, seconds))
        if self.settings.levels is not None:
            # before `update`, which decides by these counts: alike on all ranks
            self.settings.levels.held = held_by_all(self.settings.levels, self.crew)
            self.settings.levels.update(look[0].score)
        history.reason = self.watch.verdict(history, end)
        settles = self.settings.settle is not None
        if history.reason != "drift" and (not settles or is_nearest(history)):
            history.step = self.step
        elif history.reason:
            put_back(self.settings, self.good)  # and history.step stays that of the good state
        else:
            return
        self._keep()

    def _keep(self) -> None:
        """Keep the state of this moment, in the checkpoint too."""
        path = self.settings.checkpoint
        if path is None:
            self.good = mark(self.settings)
            return
        # first, since it makes the subspace explicit, and `good` is to hold no other
        state = self.saved.state(self.history, self.step, self.seconds)
        self.good = mark(self.settings)
        self.saved.write(path, state)

    def _diverged(self, what: str) -> DivergedError:
        self.history.reason = "not finite"
        path = self.settings.checkpoint
        fresh = ""
        if path is not None:
            fresh = f" Other settings need a new checkpoint path: {path} is of these."
        return DivergedError(
            f"unlearn: {what} Model and optimizer are again as they were after step {self.history.step}, the last "
            "evaluation that was kept. Ways out: a smaller learning rate, clip=1.0, a larger share of retain (alpha), "
            f"max_drift to stop before, or a loss guarded against overflow and the logarithm or root of zero.{fresh}",
            self.history,
        )

    # ---- beginning, and beginning again ----------------------------------------------------------

    def _begin(self) -> None:
        # the original: what levels and drift are counted from
        look = self.watch.look()
        self.history = self.watch.begin(look)
        sizes = self.watch.sizes(look)
        check_share(look[0].samples, sizes["retain"])
        schedule = self.epochs.schedule
        if schedule is not None:
            schedule.prepare(**known(sizes))
        self._evaluate("", look)

    def _resume(self, path: str | Path) -> None:
        state = self.saved.read(path)
        self.history = state["history"]
        self.step, self.seconds = state["step"], state["seconds"]
        self.saved.go_to(path, state)
        self.good = mark(self.settings)
        # an end by a limit is none under a longer one
        if self.history.reason not in FINAL:
            end = "max_steps" if self._all_steps_made() else ""
            self.history.reason = self.watch.verdict(self.history, end)
