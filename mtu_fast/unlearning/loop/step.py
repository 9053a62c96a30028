"""One step: the losses of both batches, what is left to forget, `.grad`, then the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtu_fast._checks.losses import labelled
from mtu_fast._distributed.crew import Crew
from mtu_fast.engine import Engine
from mtu_fast.errors import NotFiniteError
from mtu_fast.unlearning.loop.gradients import add_gradients, all_of, clip
from mtu_fast.unlearning.loop.settings import Settings
from mtu_fast.unlearning.loop.settling import slowed
from mtu_fast.unlearning.loop.shared_levels import left_of_all
from mtu_fast.unlearning.loop.state import clear_gradients, drawn_from
from mtu_fast.unlearning.modes import evaluating
from mtu_fast.unlearning.randomness import preserved
from mtu_fast.unlearning.reading import LossFunction, Side


class Step:
    """The steps of a run.

    Args:
        settings: what was asked for.
        engine: of the model.
        crew: the ranks of the engine.
        targets: the tasks to forget.
    """

    def __init__(
        self, settings: Settings, engine: Engine, crew: Crew, targets: Sequence[str]
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._crew = crew
        self._all_of_targets = all_of(targets)

    def make(self, retain: Any, forget: Any, rate: float = 1.0) -> None:
        """Move the model by one pair of batches, at a part of the learning rates.

        Raises:
            NotFiniteError: a loss or a gradient is not finite; no parameter has moved then.
        """
        s = self._settings
        on_forget = s.losses if s.forget_losses is None else s.forget_losses
        # gradients are added to what is there
        clear_gradients(s)
        add_gradients(
            self._engine,
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
            moved = [p for group in s.optimizer.param_groups for p in group["params"]]
            clip(moved, s.clip)
        with slowed(s.optimizer, rate):
            s.optimizer.step()
        if s.scheduler is not None:
            s.scheduler.step()

    # ---- what is left to forget ------------------------------------------------------------------

    def _left(
        self, batch: Any, losses: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What of a forget batch is to be forgotten still."""
        levels = self._settings.levels
        # {task: [N]}: labelled forget samples of the target tasks
        gone = self._all_of_targets(losses, present)
        if levels is None:
            return gone
        true = self._crew.agreed("unlearn: levels", lambda: self._true_losses(batch, losses))
        return left_of_all(levels, self._crew, true, gone, present)

    def _true_losses(self, batch: Any, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those that levels were measured by; a step's may be of other labels."""
        s = self._settings
        if s.forget_losses is None:
            return losses
        # what this forward draws must not change what the step draws
        with preserved(drawn_from(s)), evaluating(s.model):
            return labelled(s.losses(s.model, batch))[0]

    # ---- losses ----------------------------------------------------------------------------------

    def _forward(self, side: str, losses: LossFunction, batch: Any, called: str = "losses") -> Side:
        return self._crew.agreed(
            f"unlearn: losses of {side}", lambda: self._forward_alone(side, losses, batch, called)
        )

    def _forward_alone(self, side: str, losses: LossFunction, batch: Any, called: str) -> Side:
        named, present = labelled(losses(self._settings.model, batch), called)
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


def _named(settings: Settings) -> str:
    """Which argument gives the losses of forget batches."""
    return "losses" if settings.forget_losses is None else "forget_losses"
