"""One run: begun or resumed, then a step at a time until it is over."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtu_fast._checks.losses import labelled
from mtu_fast._distributed.crew import Crew
from mtu_fast.engine import Engine
from mtu_fast.errors import NotFiniteError
from mtu_fast.unlearning.loaders import generators_of
from mtu_fast.unlearning.loop import checkpoint
from mtu_fast.unlearning.loop.batches import END, Stream
from mtu_fast.unlearning.loop.crews import (
    check_loaders,
    describe,
    joined,
    own,
)
from mtu_fast.unlearning.loop.gradients import add_gradients, all_of
from mtu_fast.unlearning.loop.history import History
from mtu_fast.unlearning.loop.interrupts import held
from mtu_fast.unlearning.loop.levels import Held, Levels
from mtu_fast.unlearning.loop.overlap import check_data, check_share
from mtu_fast.unlearning.loop.schedule import Scheduled
from mtu_fast.unlearning.loop.settings import Settings
from mtu_fast.unlearning.loop.state import clear_gradients, kept_parts, mark, put_back, take
from mtu_fast.unlearning.loop.watch import Look, Watch, known
from mtu_fast.unlearning.modes import evaluating
from mtu_fast.unlearning.randomness import capture, preserved, restore
from mtu_fast.unlearning.reading import LossFunction, Side

FINAL = ("level", "drift")  # reasons that hold whatever limits a later call sets


class DivergedError(RuntimeError):
    """A loss or gradient was not finite; the model is that of the last evaluation, `history` says how it came."""

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
        good: the state of all that steps change at the last evaluation within all bounds.
    """

    def __init__(self, settings: Settings, engine: Engine, crew: Crew) -> None:
        self.settings = settings
        self.engine = engine
        self.crew = crew
        self.watch = Watch(settings, crew)
        crew.agreed(
            "unlearn", lambda: check_data(settings.forget, settings.retain, settings.validation)
        )
        check_loaders(crew, settings)
        self.schedule = settings.method if isinstance(settings.method, Scheduled) else None
        self.forget = Stream("forget", settings.forget)
        self.retain = Stream("retain", settings.retain)
        self.step = 0
        self.seconds = 0.0
        self.good: dict[str, Any] = {}
        path = settings.checkpoint
        # the first rank looks: others may see another file system
        if path is not None and crew.first("unlearn: checkpoint", Path(path).exists):
            self._resume(path)
        else:
            self._begin()

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """Whatever is raised inside leaves no trace of the steps since the last evaluation within all bounds."""
        try:
            yield
        except BaseException:  # Ctrl-C too
            # a second one would leave it half done
            with held():
                put_back(self.settings, self.good)
                clear_gradients(self.settings)
            raise

    def advance(self) -> None:
        """One step, and an evaluation where one is due; sets `history.reason` at the end.

        Raises:
            DivergedError: something is not finite.
        """
        start = time.perf_counter()
        batches = self._batches()
        if batches is None:
            self._evaluate("epochs", self.watch.look())
            return
        try:
            self._update(*batches)
        except NotFiniteError as error:
            raise self._diverged(f"in step {self.step + 1}, {error}") from error
        self.step += 1
        self.seconds += max(0.0, time.perf_counter() - start)  # a clock may jump
        if self._all_steps_made():
            self._evaluate("max_steps", self.watch.look())
        elif self.step % self.settings.every == 0:
            self._evaluate("", self.watch.look())

    def _all_steps_made(self) -> bool:
        limit = self.settings.max_steps
        return limit is not None and self.step >= limit

    # ---- a step ----------------------------------------------------------------------------------

    def _batches(self) -> tuple[Any, Any] | None:
        """The next retain and forget batch; None after the last epoch."""
        if self.schedule is not None and self.schedule.epoch_of == "forget":
            # the leading side first: at the end nothing is drawn from the other
            forget = self._leading(self.forget)
            return None if forget is END else (self.retain.again(), forget)
        retain = self._leading(self.retain)
        return None if retain is END else (retain, self.forget.again())

    def _leading(self, leader: Stream) -> Any:
        """The next batch of the loader whose passes are the epochs; END after the last epoch."""
        if leader.open:
            batch = leader.advance()
            if batch is not END:
                return batch
        if leader.passes >= self._epochs():
            return END
        if self.schedule is not None:
            self.schedule.start_epoch(leader.passes, lambda: self.watch.validation().loss)
        return leader.advance()

    def _epochs(self) -> float:
        wanted = [math.inf]
        if self.settings.epochs is not None:
            wanted.append(self.settings.epochs)
        if self.schedule is not None and self.schedule.epochs is not None:
            wanted.append(self.schedule.epochs)
        return min(wanted)

    def _update(self, retain: Any, forget: Any) -> None:
        s = self.settings
        on_forget = s.losses if s.forget_losses is None else s.forget_losses
        # gradients are added to what is there
        clear_gradients(s)
        add_gradients(
            self.engine,
            s.method,
            lambda: self._forward("retain", s.losses, retain),
            lambda: self._forward("forget", on_forget, forget, _named(s)),
            lambda losses, present: self._left(forget, losses, present),
            s.subspace,
            s.memory,
        )
        # one norm over all parameters scales the direction and keeps it orthogonal
        if s.clip is not None:
            # all that the step moves, also outside the shared parameters
            held = [p for group in s.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(held, s.clip)
        s.optimizer.step()
        if s.scheduler is not None:
            s.scheduler.step()

    def _left(
        self, batch: Any, losses: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What of a forget batch is to be forgotten still."""
        levels = self.settings.levels
        # {task: [N]}: labelled forget samples of the target tasks
        gone = all_of(self.history.targets)(losses, present)
        if levels is None:
            return gone
        what = "unlearn: levels"
        true = self.crew.agreed(what, lambda: self._true_losses(batch, losses))
        before, after = self._of_other_ranks(true, gone, present)
        return self.crew.agreed(
            what, lambda: levels.left(true, gone, present, before=before, after=after)
        )

    def _true_losses(self, batch: Any, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those that levels were measured by; a step's may be of other labels."""
        s = self.settings
        if s.forget_losses is None:
            return losses
        # what this forward draws must not change what the step draws
        with preserved(self._generators()), evaluating(s.model):
            return labelled(s.losses(s.model, batch))[0]

    def _of_other_ranks(
        self,
        losses: Mapping[str, Tensor],
        gone: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """{task: losses of rows to forget} in this step, of the ranks before this one and of those after it."""
        levels = self.settings.levels
        if self.crew.size == 1 or levels is None or not levels.options["quantiles"]:
            return {}, {}
        mine = {}
        for task, loss in losses.items():
            mine[task] = loss.detach().double().cpu()[(gone[task] & present[task]).cpu()]
        ranks = self.crew.objects("unlearn: levels", mine)
        return _behind_one_another(ranks[: self.crew.rank]), _behind_one_another(
            ranks[self.crew.rank + 1 :]
        )

    def _forward(self, side: str, losses: LossFunction, batch: Any, called: str = "losses") -> Side:
        return self.crew.agreed(
            f"unlearn: losses of {side}", lambda: self._forward_alone(side, losses, batch, called)
        )

    def _forward_alone(self, side: str, losses: LossFunction, batch: Any, called: str) -> Side:
        named, present = labelled(losses(self.settings.model, batch), called)
        for task, loss in named.items():
            bad = ~torch.isfinite(loss.detach())
            if not bool(bad.any()):
                continue
            # only a labelled sample's loss must be finite
            at = (bad & present[task]).nonzero().flatten()[:8].tolist()
            if at:
                raise NotFiniteError(
                    f"the loss of task {task!r} is not finite for samples {at} of the {side} batch."
                )
            named[task] = loss.masked_fill(bad, 0.0)  # without a label it gives no row
        return named, present

    def _levels_of_all(self, levels: Levels) -> Held:
        """What levels hold, with the rows that all ranks have seen."""
        mine = levels.held
        if self.crew.size == 1:
            return mine
        # as plain numbers, which can be sent
        counts = [{task: int(n) for task, n in part.items()} for part in (mine.left, mine.seen)]
        left: Counter[str] = Counter()
        seen: Counter[str] = Counter()
        for of_left, of_seen in self.crew.objects("unlearn: levels", counts):
            left.update(of_left)
            seen.update(of_seen)
        tensors = [{t: torch.tensor(n) for t, n in part.items()} for part in (left, seen)]
        return replace(mine, left=tensors[0], seen=tensors[1])

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
            self.settings.levels.held = self._levels_of_all(self.settings.levels)
            self.settings.levels.update(look[0].score)
        history.reason = self.watch.verdict(history) or end
        if history.reason == "drift":
            put_back(self.settings, self.good)  # and history.step stays that of the good state
        else:
            history.step = self.step
        self._keep()

    def _keep(self) -> None:
        """Keep the state of this moment, in the checkpoint too."""
        path = self.settings.checkpoint
        if path is None:
            self.good = mark(self.settings)
            return
        # first, since it makes the subspace explicit, and `good` is to hold no other
        state = self._state()
        self.good = mark(self.settings)
        self.crew.first("unlearn: checkpoint", lambda: checkpoint.save(path, state))

    def _diverged(self, what: str) -> DivergedError:
        self.history.reason = "not finite"
        path = self.settings.checkpoint
        fresh = ""
        if path is not None:
            fresh = f" Other settings need a new checkpoint path: {path} is of these."
        return DivergedError(
            f"unlearn: {what} Model and optimizer are again as they were after step {self.history.step}, the last "
            "evaluation. Ways out: a smaller learning rate, clip=1.0, a larger share of retain (alpha), max_drift to "
            f"stop before, or a loss guarded against overflow and the logarithm or root of zero.{fresh}",
            self.history,
        )

    # ---- beginning, and beginning again ----------------------------------------------------------

    def _begin(self) -> None:
        # the original: what levels and drift are counted from
        look = self.watch.look()
        self.history = self.watch.begin(look)
        sizes = self.watch.sizes(look)
        check_share(look[0].samples, sizes["retain"])
        if self.schedule is not None:
            self.schedule.prepare(**known(sizes))
        self._evaluate("", look)

    def _state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        state = self.crew.whole(take(self.settings, strict=True)) | {
            "settings": describe(self.crew, self.settings),
            "history": self.history.to_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "random": capture(self._generators()),
            "forget_place": self.forget.state_dict(),
            "retain_place": self.retain.state_dict(),
        }
        for name, part in kept_parts(self.settings).items():
            state[name] = part.state_dict()
        return joined(self.crew, state, list(kept_parts(self.settings)))

    def _resume(self, path: str | Path) -> None:
        needed = [name for name in ("scheduler", "method") if _has_state(self.settings, name)]
        kept = list(kept_parts(self.settings))
        needed += kept
        described = describe(self.crew, self.settings)
        state = self.crew.first(
            "unlearn: checkpoint", lambda: checkpoint.load(path, described, needed)
        )
        state = own(self.crew, state, kept)
        # each rank's slices of the whole that the first rank read
        state |= self.crew.cut(self.settings.model, self.settings.optimizer, state)
        self.history = _history(path, state["history"])
        self.step, self.seconds = state["step"], state["seconds"]
        # what a part refuses comes to light when others have their new state already
        before, drawn = mark(self.settings), capture(self._generators())
        try:
            self._go_to(path, state)
        except BaseException:
            with held():
                put_back(self.settings, before)
                restore(drawn, self._generators())
            raise
        self.good = mark(self.settings)
        # an end by a limit is none under a longer one
        if self.history.reason not in FINAL:
            self.history.reason = "max_steps" if self._all_steps_made() else ""

    def _go_to(self, path: str | Path, state: dict[str, Any]) -> None:
        """Give all parts the state of a checkpoint.

        Raises:
            ValueError: a part does not take it.
        """
        try:
            put_back(self.settings, state)
            for name, part in kept_parts(self.settings).items():
                of_rows = [] if name == "levels" else [self.engine.subspace_rows]
                part.load_state_dict(state[name], *of_rows)
            for stream in (self.forget, self.retain):
                stream.restore(state[f"{stream.name}_place"])
            restore(state["random"], self._generators())
        except Exception as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"checkpoint: {path} does not fit this run, which is as it was: {said}"
            ) from error
        # to replay a pass draws again, so generators are put in place once more at the end
        self.forget.load_state_dict(state["forget_place"])
        self.retain.load_state_dict(state["retain_place"])
        restore(state["random"], self._generators())

    def _generators(self) -> list[torch.Generator]:
        s = self.settings
        # replaying a pass may draw from any
        found = [*generators_of(s.forget, s.retain), *s.generators]
        return list({id(generator): generator for generator in found}.values())


def _behind_one_another(ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for of_rank in ranks:
        for task, losses in of_rank.items():
            found.setdefault(task, []).append(losses)
    return {task: torch.cat(pieces) for task, pieces in found.items()}


def _named(settings: Settings) -> str:
    """Which argument gives the losses of forget batches."""
    return "losses" if settings.forget_losses is None else "forget_losses"


def _has_state(settings: Settings, name: str) -> bool:
    return hasattr(getattr(settings, name), "state_dict")


def _history(path: str | Path, stored: dict[str, Any]) -> History:
    try:
        return History.from_dict(stored)
    except TypeError as error:  # a record with other fields
        raise ValueError(f"checkpoint: {path} is damaged: its history has {error}") from error
